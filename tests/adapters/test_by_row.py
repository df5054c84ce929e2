"""Equations of several adapters at one place: also of kinds that do not add; and which tensors have rows first."""

from dataclasses import dataclass

import pytest
import torch
from rows import BASE, assert_each_alone, with_adapters
from torch import nn

import lorafx
from lorafx.adapters import kinds
from lorafx.adapters.by_row import first_tensor, follows
from lorafx.adapters.config import AdapterConfig
from lorafx.adapters.kinds import Kind, Spec

aten = torch.ops.aten


@dataclass(frozen=True)
class GainConfig(AdapterConfig):
    """Of a kind that scales what goes in, and what comes out."""

    peft_type: str = "GAINS"


class Gains(Kind):
    config = GainConfig

    def tensors(self, site, config):
        return {"into": Spec("gain_in", (site.in_features,)), "out": Spec("gain_out", (site.out_features,))}

    def init(self, site, config, tensors, rng, weight):
        for tensor in tensors.values():
            nn.init.uniform_(tensor, 0.5, 2.0, generator=rng)

    def before(self, x, at):
        return aten.mul.Tensor(x, at.into)

    def after(self, y, x, at):
        return aten.mul.Tensor(y, at.out)


@pytest.fixture
def gains():
    kinds.register(Gains)
    yield {"peft_type": "GAINS", "target_modules": ["0"]}
    del kinds.KINDS["GAINS"]


@pytest.mark.parametrize("repeats", [0, 3])
def test_kinds_that_do_not_add_stand_beside_others(gains, repeats, monkeypatch):
    monkeypatch.setattr("lorafx.serving.early_calls.REPEATS", repeats)
    lora_config = {"r": 3, "target_modules": ["0", "2"], "init_lora_weights": False}
    base = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4, bias=False))
    lora = with_adapters(base, {"a": lora_config, "b": lora_config | {"lora_bias": True}})
    for name in ("g", "h"):
        lora.add_adapter(name, gains)
    lora.set_adapter(["a", "b", "g", "h"])
    x = torch.randn(6, 5, 6)
    assert_each_alone(lora, ["g", "a", BASE, "h", "b", "g"], {"input": x})
    assert_each_alone(lora, ["a", "h", "b", "a", "g", BASE], {"input": x})


MIXED = {
    "lora": {"r": 3, "init_lora_weights": False},
    "dora": {"r": 2, "use_dora": True, "init_lora_weights": False},
    "rank": {"r": 5, "init_lora_weights": False},
    "loha": {"peft_type": "LOHA", "r": 2, "init_weights": False},
    "lokr": {"peft_type": "LOKR", "r": 2, "init_weights": False},
    "ia3": {"peft_type": "IA3", "feedforward_modules": ["2"], "init_ia3_weights": False},
    "vera": {"peft_type": "VERA", "r": 4, "init_weights": False},
}


@pytest.mark.parametrize("repeats", [0, 3])
def test_kinds_of_all_sorts_stand_side_by_side(repeats, monkeypatch):
    monkeypatch.setattr("lorafx.serving.early_calls.REPEATS", repeats)
    base = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4, bias=False))
    lora = lorafx.compile(base, MIXED["lora"] | {"target_modules": ["0", "2"]}, adapter_name="lora", random_state=0)
    for number, (name, config) in enumerate(list(MIXED.items())[1:], 1):
        lora.add_adapter(name, config | {"target_modules": ["0", "2"]}, random_state=number)
    rng = torch.Generator().manual_seed(0)
    for path, parameter in lora.named_parameters():
        if any(f".{name}" in path for name in MIXED):
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=rng))
    names = ["ia3", "lora", "dora", BASE, "loha", "rank", "lokr", "vera"]
    assert_each_alone(lora, names, {"input": torch.randn(8, 5, 6)})


def test_which_tensors_have_the_rows_first():
    rows, hidden = torch.tensor([1, 0, 2]), torch.randn(3, 4, 5)
    assert follows(hidden, rows, one_token=False)
    assert follows(hidden.view(-1, 5), rows, one_token=False)
    assert follows(hidden.transpose(1, 2).contiguous().view(-1, 4), rows, one_token=False)
    assert follows(torch.zeros(3, 4, dtype=torch.int64), rows, one_token=False)
    assert follows(torch.randn(3, 5), rows, one_token=True)
    assert not follows(torch.randn(3, 5), rows, one_token=False)  # some expert's tokens
    assert not follows(torch.randn(12, 5), rows, one_token=False)
    assert not follows(hidden.transpose(0, 1), rows, one_token=False)
    assert not follows(hidden.transpose(0, 1).contiguous().view(-1, 5), rows, one_token=False)
    assert not follows(hidden.view(-1, 5)[[1, 0, 2]], rows, one_token=False)


def test_tokens_of_a_single_row_are_told_as_those_of_several():
    hidden = torch.randn(1, 4, 5)
    for tokens, is_told in ((torch.tensor([1]), True), (torch.ones(1, 4, dtype=torch.int64), False)):
        assert follows(hidden, tokens, one_token=False) and follows(hidden.view(-1, 5), tokens, one_token=False)
        assert follows(torch.randn(2, 5), tokens, one_token=False) == is_told  # some expert's
        assert follows(torch.randn(1, 6, 5), tokens, one_token=False) == is_told  # another sequence


def test_rows_are_not_told_where_vmap_hides_a_size():
    rows, seen = torch.zeros(3, dtype=torch.long), []
    torch.vmap(lambda x: seen.append(follows(x, rows, one_token=False)) or x)(torch.zeros(2, 3, 4, 5))
    assert seen == [False] and follows(torch.zeros(3, 4, 5), rows, one_token=False)


def test_the_first_tensor_of_a_call():
    ids = torch.zeros(2, 3)
    assert first_tensor([None, 3, torch.tensor(1.0), {"ids": ids}]) is ids
    assert first_tensor([None]) is None
