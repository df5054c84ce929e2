"""Merging on disk onto a checkpoint that is stored quantised in part: what is packed is copied or refused."""

import json

import models
import mxfp4
import pytest
import torch
import transformers
from merges_on_disk import LINEAR, adapter_folder, assert_same, base_folder, contents, merge, quietly, tensors_of
from safetensors.torch import load_file, save_file

import lorafx
from lorafx.errors import CheckpointError

ATTENTION = {"target_modules": ["q_proj", "v_proj"]}


def test_attention_is_merged_and_packed_experts_are_copied(tmp_path):
    base = mxfp4.checkpoint(tmp_path / "base")
    cls = transformers.AutoModelForCausalLM
    adapter = adapter_folder(base, cls, **ATTENTION)
    out = merge(base, adapter, tmp_path / "out")
    before, after = tensors_of(base), tensors_of(out)
    merged = quietly(lorafx.load, cls.from_pretrained(base, dtype="auto"), adapter).merge_and_unload().state_dict()
    assert_same(after, {key: merged[key].contiguous() if "self_attn" in key else before[key] for key in before})
    assert {key.split(".")[-2] for key in before if not torch.equal(before[key], after[key])} == {"q_proj", "v_proj"}
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_packed_experts_are_merged_into_what_was_saved_dequantised(tmp_path):
    base = mxfp4.checkpoint(tmp_path / "base")
    experts = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}
    adapter = adapter_folder(base, transformers.AutoModelForCausalLM, **experts)
    with pytest.raises(CheckpointError, match=r"quantised \(mxfp4\), .*experts\.gate_up_proj as well.*dequantised"):
        merge(base, adapter, tmp_path / "out")
    assert not [name for name in contents(tmp_path) if name.startswith(("out", ".out"))]
    dense = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    dense.save_pretrained(tmp_path / "dense", save_original_format=False)  # else transformers names them packed
    out = merge(tmp_path / "dense", adapter, tmp_path / "out")
    merged = quietly(lorafx.load, dense, adapter).merge_and_unload()
    again = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()
    assert_same(again, {key: tensor for key, tensor in merged.state_dict().items() if key in again})


@pytest.fixture
def float8(tmp_path):
    """A llama of bfloat16 whose queries are in 8 bits with a scale in float32, and whose keys only have a scale."""
    base = base_folder(tmp_path, models.llama(num_hidden_layers=1), torch.bfloat16, shard="1GB")
    tensors = load_file(base / "model.safetensors")
    for key in [key for key in tensors if key.endswith(("q_proj.weight", "k_proj.weight"))]:
        tensors[f"{key}_scale_inv"] = torch.ones(1, 1)
        if "q_proj" in key:
            tensors[key] = tensors[key].to(torch.float8_e4m3fn)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    settings = {"quant_method": "fp8", "dtype": "kept"}
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return base


def dense_twin(base):
    """The same checkpoint before it was quantised, for adapters to be made on."""
    return base.parent / "first"


@pytest.mark.parametrize("target", ["q_proj", "k_proj"])
def test_a_weight_that_has_a_scale_is_refused(float8, tmp_path, target):
    adapter = adapter_folder(dense_twin(float8), transformers.LlamaForCausalLM, target_modules=[target])
    with pytest.raises(CheckpointError, match=rf"\(fp8\), .*{target}\.weight as well.*original checkpoint"):
        merge(float8, adapter, tmp_path / "out")


def test_a_dtype_is_that_of_what_is_dense(float8, tmp_path):
    adapter = adapter_folder(dense_twin(float8), transformers.LlamaForCausalLM, target_modules=["v_proj"])
    out = merge(float8, adapter, tmp_path / "out", dtype=torch.float16)
    before, after = tensors_of(float8), tensors_of(out)
    kept = {key for key in before if "q_proj" in key or "k_proj" in key}
    assert all(torch.equal(before[key].float(), after[key].float()) for key in kept)
    assert all(after[key].dtype == (before[key].dtype if key in kept else torch.float16) for key in before)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["dtype"] == "kept"


def test_a_checkpoint_where_nothing_is_packed_is_refused(tmp_path):
    """Its layers round their weights whenever they run, as BitNet's do: which of them do, no file says."""
    base = base_folder(tmp_path, models.llama(num_hidden_layers=1))
    adapter = adapter_folder(base, transformers.LlamaForCausalLM, **LINEAR)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitnet"}}))
    with pytest.raises(CheckpointError, match=r"stored quantised \(bitnet\)"):
        merge(base, adapter, tmp_path / "out")
