"""An adapter on a quantised base makes up for what quantising took, as PEFT's `replace_lora_weights_loftq` has it."""

from __future__ import annotations

import json
import warnings

import models
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes")

import quantised
from on_cpu import OnCpu

import lorafx
from lorafx.errors import AdapterError, CheckpointError
from lorafx.testing import adapter_tensors, assert_same_tensors

FILE = "model.safetensors"
SITE = "model.layers.0.self_attn.q_proj"


def adapted(folder, how="nf4", **config):
    """A quantised model with an adapter of scaling 1; `folder/base` has the full model."""
    settings = quantised.CONFIG | {"lora_alpha": 4} | config
    return lorafx.compile(quantised.quantised(folder / "base", how), settings, random_state=1)


def state(lora) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in adapter_tensors(lora).items()}


@pytest.mark.parametrize("how", ["nf4", "fp4"])
def test_values_are_pefts(tmp_path, how):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = quantised.twins(tmp_path, how)
    lorafx.replace_lora_weights_loftq(ours, tmp_path / "base")
    with OnCpu():
        peft.replace_lora_weights_loftq(theirs, str(tmp_path / "base"))
    expected = {n.removeprefix("base_model.model."): p for n, p in theirs.named_parameters() if ".lora_" in n}
    own = dict(ours.named_parameters())
    for name, value in expected.items():
        torch.testing.assert_close(own[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_the_best_change_of_that_rank_is_found(tmp_path, how):
    lora = adapted(tmp_path, how, init_lora_weights=True)
    site = lora.sites.by_name[SITE]
    module = lora.get_submodule(SITE)
    full = load_file(tmp_path / "base" / FILE)[f"{SITE}.weight"]
    lost = full - site.storage.dense(site.storage.stored(module, "weight")).float()
    lorafx.replace_lora_weights_loftq(lora)  # from where the base was loaded
    update = module.lora_B.default.weight @ module.lora_A.default.weight
    left = torch.linalg.svdvals(lost)[4:].norm()
    torch.testing.assert_close((lost - update).norm(), left, rtol=1e-4, atol=1e-6)
    assert left < 0.95 * lost.norm()


def test_a_callback_keeps_what_it_likes(tmp_path):
    lora = adapted(tmp_path)
    before, asked = state(lora), []
    parameters = {name: id(p) for name, p in lora.named_parameters()}

    def likes(model, name):
        asked.append(name)
        key = f"{name}.lora_A.default.weight"
        assert model is lora and not torch.equal(state(lora)[key], before[key])
        return name.endswith("q_proj")

    lorafx.replace_lora_weights_loftq(lora, tmp_path / "base" / FILE, callback=likes)
    assert asked == [site.module for site in lora.sites]
    changed = {name for name, value in state(lora).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "q_proj" in name}
    assert {name: id(p) for name, p in lora.named_parameters()} == parameters

    def fails(model, name):
        raise RuntimeError("stop")

    kept = state(lora)
    with pytest.raises(RuntimeError, match="stop"):
        lorafx.replace_lora_weights_loftq(lora, callback=fails)
    assert_same_tensors(state(lora), kept)


def test_weights_are_found_in_shards_and_without_the_inner_models_name(tmp_path):
    lora = adapted(tmp_path)
    lorafx.replace_lora_weights_loftq(lora, tmp_path / "base")
    expected = state(lora)
    tensors = {name.removeprefix("model."): t for name, t in load_file(tmp_path / "base" / FILE).items()}
    shards = [dict(list(tensors.items())[half::2]) for half in (0, 1)]
    folder = tmp_path / "shards"
    folder.mkdir()
    owners = {}
    for number, shard in enumerate(shards):
        save_file(shard, folder / f"model-{number}.safetensors")
        owners |= dict.fromkeys(shard, f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": owners}))
    again = adapted(tmp_path)
    lorafx.replace_lora_weights_loftq(again, folder)
    assert_same_tensors(state(again), expected)


def test_what_cannot_be_replaced_stays(tmp_path):
    lora = adapted(tmp_path)
    kept, tensors = state(lora), load_file(tmp_path / "base" / FILE)
    last = [site.weight for site in lora.sites][-1]
    for folder, value, message in (("lacks", None, "has model"), ("other", torch.ones(3, 5), "the model needs")):
        (tmp_path / folder).mkdir()
        values = {**tensors, last: value}
        save_file({name: t for name, t in values.items() if t is not None}, tmp_path / folder / FILE)
        with pytest.raises(CheckpointError, match=message):
            lorafx.replace_lora_weights_loftq(lora, tmp_path / folder)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / FILE).write_bytes(b"no such thing")
    with pytest.raises(CheckpointError, match="broken"):
        lorafx.replace_lora_weights_loftq(lora, tmp_path / "broken")
    (tmp_path / "index").mkdir()
    (tmp_path / "index/model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds no JSON object"):
        lorafx.replace_lora_weights_loftq(lora, tmp_path / "index")
    with pytest.raises(CheckpointError, match=r"nowhere has no model\.safetensors"):
        lorafx.replace_lora_weights_loftq(lora, tmp_path / "nowhere")
    with pytest.raises(AdapterError, match="no adapter 'other'"):
        lorafx.replace_lora_weights_loftq(lora, adapter_name="other")
    assert_same_tensors(state(lora), kept)
    with pytest.raises(AdapterError, match="adapts no quantised weight"):
        lorafx.replace_lora_weights_loftq(lorafx.compile(models.llama(), quantised.CONFIG))
    with pytest.raises(AdapterError, match="is not adapted"):
        lorafx.replace_lora_weights_loftq(models.llama())
