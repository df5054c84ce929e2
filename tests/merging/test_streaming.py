"""merge: adapters onto a checkpoint on disk, as merging in memory gives it, file by file, or one error and no file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import peft
import pytest
import torch
import transformers
from merges_on_disk import (
    LINEAR,
    adapter_folder,
    assert_same,
    base_folder,
    contents,
    loaded,
    merge,
    merged_in_memory,
    quietly,
    tensors_of,
)
from safetensors.torch import load_file, save_file
from torch import nn

import lorafx
from lorafx.errors import LorafxError, MergeError
from lorafx.merging import steps


def mixtral(**settings: Any) -> nn.Module:
    """Experts that a checkpoint has one by one, and the model in one tensor."""
    config = transformers.MixtralConfig(
        vocab_size=90,
        hidden_size=48,
        intermediate_size=80,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        num_local_experts=4,
        **settings,
    )
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(config)


def tied() -> nn.Module:
    return models.llama(num_hidden_layers=1, tie_word_embeddings=True)


# --- what is written -------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[Callable[..., nn.Module], torch.dtype, list[dict[str, Any]]]] = {
    "linear": (models.llama, torch.float32, [LINEAR]),
    "linear in bfloat16": (models.llama, torch.bfloat16, [LINEAR]),
    "patterns": (models.llama, torch.float32, [LINEAR | {"rank_pattern": {"q_proj": 2}, "use_rslora": True}]),
    "two adapters": (models.llama, torch.bfloat16, [LINEAR, {"target_modules": ["q_proj", "lm_head"]}]),
    "two adapters, one with copies": (
        models.llama,
        torch.float32,
        [{"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, {"target_modules": ["q_proj", "up_proj"]}],
    ),
    "tied embeddings": (tied, torch.bfloat16, [{"target_modules": ["embed_tokens", "q_proj"]}]),
    "tied head": (tied, torch.float32, [{"target_modules": ["lm_head", "q_proj"]}]),
    "conv1d": (models.gpt2, torch.float32, [{"target_modules": ["c_attn", "c_proj", "wte"], "bias": "lora_only"}]),
    "encoder-decoder": (models.t5, torch.bfloat16, [{"target_modules": ["q", "wo", "shared"]}]),
    "classifier": (models.bert, torch.float32, [{"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}]),
    "convolution": (models.vit, torch.float16, [{"target_modules": ["q_proj", "projection"]}]),
    "experts": (mixtral, torch.bfloat16, [{"target_modules": ["q_proj", "o_proj"]}]),
    "whole experts": (mixtral, torch.float32, [{"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}]),
}


def prepared(place: Path, case: str) -> tuple[type, Path, list[Path]]:
    make, dtype, settings = CASES[case]
    model = make()
    base = base_folder(place, model, dtype)
    adapters = [adapter_folder(base, type(model), seed, **each) for seed, each in enumerate(settings)]
    return type(model), base, adapters


@pytest.mark.parametrize("case", CASES)
def test_the_files_are_those_of_merging_in_memory(tmp_path, case):
    cls, base, adapters = prepared(tmp_path, case)
    merged_in_memory(base, cls, adapters).save_pretrained(tmp_path / "twin", max_shard_size="20KB")
    assert merge(base, adapters, tmp_path / "out") == tmp_path / "out"
    twin, out = contents(tmp_path / "twin"), contents(tmp_path / "out")
    assert twin.keys() == out.keys() and sum(name.endswith(".safetensors") for name in twin) > 2
    assert [name for name in twin if twin[name] != out[name]] == []
    assert contents(base) != out


def test_blocks_of_rows_are_merged_as_the_whole_is(tmp_path, monkeypatch):
    _, base, adapters = prepared(tmp_path, "tied embeddings")
    merge(base, adapters, tmp_path / "whole")
    monkeypatch.setattr(steps, "_ON_CPU", 48 * 7)
    merge(base, adapters, tmp_path / "blocks")
    assert contents(tmp_path / "whole") == contents(tmp_path / "blocks")


def test_one_file_stays_one_file(tmp_path):
    base = base_folder(tmp_path, models.llama(), shard="1GB")
    adapter = adapter_folder(base, transformers.LlamaForCausalLM, **LINEAR)
    merge(str(base), str(adapter), tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {file.name for file in base.iterdir()}
    twin = merged_in_memory(base, transformers.LlamaForCausalLM, [adapter])
    assert_same(tensors_of(tmp_path / "out"), twin.state_dict())


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_model_of_code_of_its_own_is_merged_by_names(tmp_path, dtype):
    """Linear layers are those with a weight of two dimensions, embeddings those that the adapter has tensors for."""
    base = base_folder(tmp_path, models.llama())
    targets = {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    adapter = adapter_folder(base, transformers.LlamaForCausalLM, **targets)
    merge(base, adapter, tmp_path / "expected", dtype=dtype)
    config = json.loads((base / "config.json").read_text())
    own = {"model_type": "of its own", "architectures": ["Own"], "auto_map": {"AutoModelForCausalLM": "own.Own"}}
    (base / "config.json").write_text(json.dumps(config | own))
    (base / "own.py").write_text("raise SystemExit('code that nobody asked for')")
    merge(base, adapter, tmp_path / "out", dtype=dtype)
    assert_same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "expected"))
    found = json.loads((tmp_path / "out/config.json").read_text())
    assert found["architectures"] == ["Own"] and (tmp_path / "out/own.py").exists()
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": ["input_layernorm"]}))
    with pytest.raises(LorafxError):
        merge(base, adapter, tmp_path / "refused")


@pytest.mark.parametrize("shards", [1, 2])
def test_a_base_in_torchs_own_files_is_merged_into_safetensors(tmp_path, shards):
    """Embeddings and head are tied, and there twice in such files."""
    base = base_folder(tmp_path, models.llama(tie_word_embeddings=True), shard="1GB")
    adapter = adapter_folder(base, transformers.LlamaForCausalLM, **LINEAR)
    merge(base, adapter, tmp_path / "expected")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    (base / "model.safetensors").unlink()
    names = ["pytorch_model.bin"] if shards == 1 else [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    parts = [list(tensors)[place::shards] for place in range(shards)]
    for name, keys in zip(names, parts):
        torch.save({key: tensors[key] for key in keys}, base / name)
    if shards == 2:
        places = {key: name for name, keys in zip(names, parts) for key in keys}
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": places}
        (base / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    merge(base, adapter, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.bin*"))
    found = [loaded(tmp_path / name, transformers.LlamaForCausalLM).state_dict() for name in ("expected", "out")]
    assert_same(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_what_peft_merges_but_for_rounding(tmp_path, dtype):
    base = base_folder(tmp_path, models.llama(), dtype)
    adapter = adapter_folder(base, transformers.LlamaForCausalLM, **LINEAR)
    merge(base, adapter, tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(loaded(base, transformers.LlamaForCausalLM), adapter).merge_and_unload()
    ours, before = tensors_of(tmp_path / "out"), tensors_of(base)
    for name, expected in theirs.state_dict().items():
        # A sum of four products and of two numbers, each rounded: PEFT's in float32, then ΔW in the weight's dtype.
        error = (ours[name].double() - expected.double()).abs()
        scale = ours[name].double().abs() + before[name].double().abs()
        assert (error <= 2 * torch.finfo(dtype).eps * scale + 8 * torch.finfo(torch.float32).eps).all(), name


@pytest.mark.parametrize(
    ("make", "saved"),
    [
        (tied, ["lm_head"]),
        (tied, ["embed_tokens"]),
        (tied, ["lm_head", "embed_tokens"]),
        (lambda: models.t5(num_layers=1), ["lm_head"]),
        (lambda: models.t5(num_layers=1), ["shared"]),
        (lambda: models.gpt2(n_layer=1), ["wte"]),
    ],
    ids=["head", "embeddings", "both", "t5's head", "t5's embeddings", "gpt2's embeddings"],
)
def test_an_end_of_a_tie_that_the_adapter_has_a_copy_of_is_added(tmp_path, make, saved):
    model = make()
    base, cls = base_folder(tmp_path, model), type(model)
    target = {"LlamaForCausalLM": "q_proj", "GPT2LMHeadModel": "c_attn"}.get(cls.__name__, "q")
    adapter = adapter_folder(base, cls, target_modules=[target], modules_to_save=saved)
    merge(base, adapter, tmp_path / "out")
    expected = merged_in_memory(base, cls, [adapter])
    out = loaded(tmp_path / "out", cls)
    assert_same(out.state_dict(), expected.state_dict())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    added = sum(tensor.numel() for tensor in tensors_of(tmp_path / "out").values())
    assert index["metadata"]["total_size"] == 4 * added and index["metadata"]["total_parameters"] == added
    assert index["weight_map"].keys() == tensors_of(tmp_path / "out").keys()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    ties, there = model.all_tied_weights_keys, tensors_of(tmp_path / "out").keys()
    assert config.get("tie_word_embeddings", True) is not ({*ties, *ties.values()} <= there)


def test_a_head_that_only_the_adapter_has_makes_a_model_of_another_class(tmp_path):
    base = base_folder(tmp_path, models.llama(num_labels=3))
    cls = transformers.LlamaForSequenceClassification
    adapter = adapter_folder(base, cls, target_modules=["q_proj"], task_type="SEQ_CLS")
    merge(base, adapter, tmp_path / "out")
    with pytest.raises(AssertionError, match="score"):  # a head that is made anew each time
        assert_same(loaded(base, cls).state_dict(), loaded(base, cls).state_dict())
    out, score = loaded(tmp_path / "out", cls), load_file(adapter / "adapter_model.safetensors")
    assert torch.equal(out.score.weight, score["base_model.model.score.weight"])
    expected = merged_in_memory(base, cls, [adapter])
    assert_same(out.state_dict(), expected.state_dict())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [cls.__name__]


def test_keys_without_the_models_prefix_stay_so(tmp_path):
    base = base_folder(tmp_path, models.gpt2().transformer)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    adapter = adapter_folder(base, transformers.GPT2LMHeadModel, target_modules=["c_attn"], modules_to_save=["lm_head"])
    merge(base, adapter, tmp_path / "out")
    keys = tensors_of(tmp_path / "out").keys()
    assert keys - tensors_of(base).keys() == {"lm_head.weight"} and "h.0.attn.c_attn.weight" in keys
    expected = merged_in_memory(base, transformers.GPT2LMHeadModel, [adapter])
    assert_same(loaded(tmp_path / "out", transformers.GPT2LMHeadModel).state_dict(), expected.state_dict())


def test_an_adapter_of_the_bare_model_goes_onto_the_whole_checkpoint(tmp_path):
    base = base_folder(tmp_path, models.llama())
    cls = transformers.LlamaModel
    adapter = adapter_folder(base, cls, target_modules=["q_proj"], task_type="FEATURE_EXTRACTION")
    merge(base, adapter, tmp_path / "out")
    assert tensors_of(tmp_path / "out").keys() == tensors_of(base).keys()
    expected = merged_in_memory(base, cls, [adapter])
    assert_same(loaded(tmp_path / "out", cls).state_dict(), expected.state_dict())


def test_embeddings_saved_along_take_the_place_of_the_bases(tmp_path):
    base, cls = base_folder(tmp_path, models.llama()), transformers.LlamaForCausalLM
    model = loaded(base, cls)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(3)
    lora = quietly(lorafx.compile, model, {"target_modules": ["embed_tokens"], "init_lora_weights": False})
    quietly(lora.save_pretrained, tmp_path / "adapter", save_embedding_layers=True)
    merge(base, tmp_path / "adapter", tmp_path / "out")
    expected = merged_in_memory(base, cls, [tmp_path / "adapter"]).state_dict()
    assert_same(tensors_of(tmp_path / "out"), expected)


# --- dtype -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
def test_a_dtype_is_rounded_to_once(tmp_path, asked):
    base = base_folder(tmp_path, models.llama())
    adapter = adapter_folder(base, transformers.LlamaForCausalLM, target_modules=["q_proj"], modules_to_save=["norm"])
    merge(base, adapter, tmp_path / "wide")
    merge(base, adapter, tmp_path / "out", dtype=asked)
    expected = {key: tensor.to(torch.bfloat16) for key, tensor in tensors_of(tmp_path / "wide").items()}
    assert_same(tensors_of(tmp_path / "out"), expected)
    assert loaded(tmp_path / "out", transformers.LlamaForCausalLM).dtype == torch.bfloat16
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(2 * tensor.numel() for tensor in expected.values())


def test_a_wider_dtype_keeps_what_the_stored_one_would_lose(tmp_path):
    base = base_folder(tmp_path, models.llama(num_hidden_layers=1), torch.bfloat16)
    adapter = adapter_folder(base, transformers.LlamaForCausalLM, target_modules=["q_proj"])
    merge(base, adapter, tmp_path / "out", dtype="float32")
    wide = merged_in_memory_in_float32(base, adapter)
    assert_same(tensors_of(tmp_path / "out"), wide)


def merged_in_memory_in_float32(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = loaded(base, transformers.LlamaForCausalLM, torch.float32)
    return quietly(lorafx.load, model, adapter).merge_and_unload().state_dict()


def test_what_transformers_keeps_in_float32_keeps_its_dtype(tmp_path):
    base = base_folder(tmp_path, models.t5(num_layers=1))
    adapter = adapter_folder(base, transformers.T5ForConditionalGeneration, target_modules=["q"])
    merge(base, adapter, tmp_path / "out", dtype="float16")
    dtypes = {key: tensor.dtype for key, tensor in tensors_of(tmp_path / "out").items()}
    like = loaded(base, transformers.T5ForConditionalGeneration, torch.float16).state_dict()
    assert dtypes == {key: like[key].dtype for key in dtypes} and set(dtypes.values()) == {torch.float16, torch.float32}


def test_numbers_that_do_not_fit_the_dtype_are_an_error_and_leave_no_folder(tmp_path):
    base = base_folder(tmp_path, models.llama(num_hidden_layers=1))
    adapter = adapter_folder(base, transformers.LlamaForCausalLM, target_modules=["q_proj"])
    file = next(file for file in base.glob("*.safetensors") if "model.norm.weight" in load_file(file))
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(MergeError, match=r"model\.norm\.weight holds numbers too large for torch\.float16"):
        merge(base, adapter, tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()
    merge(base, adapter, tmp_path / "out", dtype="bfloat16")


# --- what lies beside the weights ------------------------------------------------------------------------------------


def test_other_files_are_copied_and_other_weights_are_not(tmp_path):
    base = base_folder(tmp_path, models.llama(num_hidden_layers=1))
    adapter = adapter_folder(base, transformers.LlamaForCausalLM, target_modules=["q_proj"])
    kept = {"tokenizer.json": b"{}", "README.md": b"card", "1_Pooling/config.json": b"{1}", "chat_template.jinja": b"."}
    left = {"pytorch_model.bin": b"old", "original/consolidated.00.pth": b"old", "2_Dense/model.safetensors": b"other"}
    hidden = {".git/HEAD": b"main", ".gitattributes": b"lfs"}
    for name, data in (kept | left | hidden).items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(data)
    with pytest.warns(UserWarning, match="not copied, being weights that are not merged: .*2_Dense/model.safetensors"):
        lorafx.merge(base, adapter, tmp_path / "out")
    out = contents(tmp_path / "out")
    assert {name: out.get(name) for name in kept} == kept
    assert not out.keys() & (left | hidden).keys()
    assert out["config.json"] == (base / "config.json").read_bytes()
