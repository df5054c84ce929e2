"""Several adapters, and adapters as they start, are as in PEFT."""

from __future__ import annotations

import copy
from pathlib import Path

import models
import peft
import pytest
import torch
from cases import ATTENTION, ONE_LAYER, WEIGHTS, assert_within, file_key, largest
from safetensors.torch import load_file
from torch import nn

import lorafx
from lorafx.testing import assert_same_tensors

pytestmark = pytest.mark.slow  # real PEFT beside lorafx

SECOND = {"target_modules": ["q_proj", "up_proj"], "r": 3, "lora_alpha": 9, "init_lora_weights": False}
FIRST = {"target_modules": ATTENTION, "r": 4, "lora_alpha": 6, "init_lora_weights": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder: Path) -> tuple[peft.PeftModel, lorafx.AdaptedModel]:
    """PEFT's model with two adapters, and ours with the same two read from PEFT's folders."""
    torch.manual_seed(4)
    theirs = peft.get_peft_model(models.llama(**ONE_LAYER["llama"]), peft.LoraConfig(**FIRST)).eval()
    theirs.add_adapter("second", peft.LoraConfig(**SECOND))
    theirs.save_pretrained(folder)
    ours = lorafx.load(models.llama(**ONE_LAYER["llama"]), folder)
    ours.load_adapter(folder / "second", "second")
    return theirs, ours


def assert_same_logits(ours: nn.Module, theirs: nn.Module) -> None:
    inputs = models.call("llama")
    expected = theirs(**inputs).logits
    assert_within(ours(**inputs).logits, expected, 1e-6 * largest(expected), "logits")


@torch.no_grad()
@pytest.mark.parametrize("active", [["second"], ["second", "default"], ["default"]], ids=str)
def test_several_active_adapters_act_as_in_peft(two: tuple, active: list[str]) -> None:
    theirs, ours = two
    theirs.base_model.set_adapter(active)
    ours.set_adapter(active)
    assert ours.active_adapters == active
    assert_same_logits(ours, theirs)


@torch.no_grad()
def test_a_disabled_adapter_leaves_the_base_as_in_peft(two: tuple) -> None:
    theirs, ours = two
    with theirs.disable_adapter(), ours.disable_adapter():
        assert_same_logits(ours, theirs)


@torch.no_grad()
def test_merged_logits_are_those_of_peft(two: tuple) -> None:
    theirs, ours = two
    for model in (theirs, ours):
        model.merge_adapter(["default", "second"])
    assert_same_logits(ours, theirs)
    for model in (theirs, ours):
        model.unmerge_adapter()


def test_several_adapters_are_saved_where_peft_saves_them(two: tuple, folder: Path, tmp_path: Path) -> None:
    _, ours = two
    ours.save_pretrained(tmp_path / "ours")
    for place in ("", "second"):
        written = load_file(tmp_path / "ours" / place / WEIGHTS)
        assert_same_tensors(written, load_file(folder / place / WEIGHTS))


@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["embed_tokens"]], ids=["linear", "embedding"])
def test_start_values_spread_as_pefts(init: bool | str, targets: list[str]) -> None:
    """Standard deviations agree, being of some 10,000 values; means are 0 within five deviations of a mean."""
    base = models.llama(hidden_size=96, intermediate_size=160)
    biased = init != "gaussian" and targets[0] == "q_proj"
    config = peft.LoraConfig(r=32, target_modules=targets, init_lora_weights=init, lora_bias=biased)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    ours = lorafx.compile(base, copy.deepcopy(config), random_state=0)
    expected = {file_key(n): p.detach() for n, p in theirs.named_parameters() if "lora_" in n}
    actual = {file_key(n): p.detach() for n, p in ours.named_parameters() if "lora_" in n}
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        spread = 0.5 if tensor.ndim == 1 else 0.05  # a bias has a hundred values
        assert float(actual[key].std()) == pytest.approx(float(tensor.std()), rel=spread), key
        assert abs(float(actual[key].mean())) <= 5 * float(tensor.std()) / tensor.numel() ** 0.5


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_a_new_adapter_changes_nothing_as_in_peft(init: bool | str) -> None:
    base = models.llama(**ONE_LAYER["llama"]).eval()
    lora = lorafx.compile(base, lorafx.LoraConfig(target_modules="all-linear", init_lora_weights=init)).eval()
    with torch.no_grad():
        inputs = models.call("llama")
        assert torch.equal(lora(**inputs).logits, base(**inputs).logits)
