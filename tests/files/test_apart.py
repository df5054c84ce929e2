"""Adapters of experts that were a layer each, as transformers 4 had them, on models that stack their weights."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import lorafx
from lorafx.errors import CheckpointError

HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
SIZES = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, **HEADS}
INNER, EXPERTS, RANK, ALPHA = 24, 3, 2, 5


def qwen():
    sizes = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": INNER}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **sizes)), "mlp", ("gate_proj", "up_proj", "down_proj")


def mixtral():
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=EXPERTS, intermediate_size=INNER))
    return model, "block_sparse_moe", ("w1", "w3", "w2")


def phimoe():
    """Its router is a linear layer still, under another name."""
    sizes = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "intermediate_size": INNER}
    return PhimoeForCausalLM(PhimoeConfig(**SIZES, **sizes)), "block_sparse_moe", ("w1", "w3", "w2")


def layers(block: str, names: tuple[str, str, str]) -> dict[str, tuple[int, int]]:
    """What transformers 4 had as linear layers, by name: how many features they gave and took."""
    found = {}
    for number in range(2):
        of_layer = f"model.layers.{number}"
        found[f"{of_layer}.self_attn.q_proj"] = (16, 16)
        found[f"{of_layer}.{block}.gate"] = (EXPERTS, 16)
        for expert in range(EXPERTS):
            shapes = (INNER, 16), (INNER, 16), (16, INNER)
            found |= {f"{of_layer}.{block}.experts.{expert}.{name}": shape for name, shape in zip(names, shapes)}
    return found


def written(folder: Path, block: str, names: tuple[str, str, str], **config) -> dict[str, torch.Tensor]:
    """Write such an adapter as PEFT did; returns what it adds to each layer's weight, without the scaling."""
    tensors, added = {}, {}
    for layer, (outputs, inputs) in layers(block, names).items():
        a, b = torch.randn(RANK, inputs), torch.randn(outputs, RANK)
        tensors |= {f"base_model.model.{layer}.lora_A.weight": a, f"base_model.model.{layer}.lora_B.weight": b}
        added[layer.replace("block_sparse_moe", "mlp")] = b @ a
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    values = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "gate", *names]}
    (folder / "adapter_config.json").write_text(json.dumps(values | config))
    return added


def with_added(base, added: dict[str, torch.Tensor], names: tuple[str, str, str], scaling: float):
    """A copy of a model with the adapter in its weights, put there one layer after the other."""
    model = copy.deepcopy(base)
    state = model.state_dict()
    for layer, delta in added.items():
        block, _, expert = layer.partition(".experts.")
        if not expert:
            router = f"{block.removesuffix('.gate')}.router.weight"
            state[router if router in state else f"{layer}.weight"] += scaling * delta
            continue
        number, name = expert.split(".")
        if name == names[2]:
            state[f"{block}.experts.down_proj"][int(number)] += scaling * delta
        else:
            rows = slice(INNER * names.index(name), INNER * (names.index(name) + 1))
            state[f"{block}.experts.gate_up_proj"][int(number), rows] += scaling * delta
    return model


def assert_same_weights(ours, expected) -> None:
    theirs = expected.state_dict()
    for name, weight in ours.state_dict().items():
        torch.testing.assert_close(weight, theirs[name], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("made", [qwen, mixtral])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_experts_apart_become_those_of_the_stacked_parameters(tmp_path, made, use_rslora) -> None:
    base, block, names = made()
    added = written(tmp_path / "old", block, names, use_rslora=use_rslora)
    expected = with_added(base, added, names, ALPHA / (RANK**0.5 if use_rslora else RANK))
    lora = lorafx.load(copy.deepcopy(base), tmp_path / "old")
    lora.save_pretrained(tmp_path / "new")
    assert_same_weights(lora.merge_and_unload(), expected)
    again = lorafx.load(copy.deepcopy(base), tmp_path / "new")
    assert_same_weights(again.merge_and_unload(), expected)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "new")
    assert_same_weights(theirs.merge_and_unload(), expected)


def every(names) -> list[str]:
    return ["q_proj", "gate", *names]


def in_full(names) -> list[str]:
    return list(layers("block_sparse_moe" if "w1" in names else "mlp", names))


def regex(names) -> str:
    return rf".*\.({'|'.join(every(names))})"


@pytest.mark.parametrize("made", [qwen, mixtral, phimoe])
@pytest.mark.parametrize("targets", [every, in_full, regex])
def test_targets_of_old_names_mean_what_is_there_now(tmp_path, made, targets) -> None:
    base, block, names = made()
    added = written(tmp_path / "old", block, names, target_modules=targets(names))
    lora = lorafx.load(copy.deepcopy(base), tmp_path / "old")
    assert_same_weights(lora.merge_and_unload(), with_added(base, added, names, ALPHA / RANK))


def test_peft_computes_the_same_from_the_old_file(tmp_path) -> None:
    base, block, names = qwen()
    written(tmp_path / "old", block, names)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "old").merge_and_unload()
    assert_same_weights(lorafx.load(base, tmp_path / "old").merge_and_unload(), theirs)


def test_dropout_is_left_out_and_said(tmp_path) -> None:
    base, block, names = qwen()
    written(tmp_path / "old", block, names, lora_dropout=0.1)
    with pytest.warns(UserWarning, match="have no dropout"):
        lora = lorafx.load(base, tmp_path / "old", is_trainable=True)
    assert lora.peft_config["default"].lora_dropout == 0


def test_ranks_of_their_own_are_refused(tmp_path) -> None:
    base, block, names = qwen()
    written(tmp_path / "old", block, names, alpha_pattern={"up_proj": 9})
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.experts\.gate_up_proj.*merge it there"):
        lorafx.load(base, tmp_path / "old")


def without(folder: Path, *lost: str) -> None:
    """Take layers out of a file."""
    file = folder / "adapter_model.safetensors"
    save_file({key: each for key, each in load_file(file).items() if not any(f".{one}." in key for one in lost)}, file)


@pytest.mark.parametrize("lost", [["experts.1.up_proj"], ["up_proj"], ["experts.1"], ["experts.0", "experts.2"]])
def test_a_missing_expert_is_refused_and_the_model_unchanged(tmp_path, lost) -> None:
    base, block, names = qwen()
    written(tmp_path / "old", block, names)
    without(tmp_path / "old", *lost)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    with pytest.raises(CheckpointError, match="none that fit together"):
        lorafx.load(base, tmp_path / "old")
    assert all(torch.equal(weight, before[name]) for name, weight in base.state_dict().items())
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_half_of_the_experts_are_not_taken_for_all_with_half_the_rank(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "EXPERTS", 4)
    base, block, names = qwen()
    written(tmp_path / "old", block, names)
    without(tmp_path / "old", "experts.2", "experts.3")
    with pytest.raises(CheckpointError, match="4 experts"):
        lorafx.load(base, tmp_path / "old")


def test_another_rank_than_the_config_says_is_refused(tmp_path) -> None:
    base, block, names = qwen()
    written(tmp_path / "old", block, names, r=2 * RANK)
    without(tmp_path / "old", "q_proj", "gate")
    with pytest.raises(CheckpointError, match="of rank `r`"):
        lorafx.load(base, tmp_path / "old")
