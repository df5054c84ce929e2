"""Kinds in odd company: copies of models, packed weights, weights read two ways, kinds that wrap on both sides."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from graphs import adapted
from modules import cases
from test_kind import Ia3Config, known  # noqa: F401, the fixture that makes the kind known
from torch import nn
from transformers.pytorch_utils import Conv1D
from uses import randomize

import lorafx
from lorafx.adapters import kinds
from lorafx.adapters.config import AdapterConfig
from lorafx.adapters.kinds import Kind, Spec
from lorafx.errors import ConfigError, MergeError

aten = torch.ops.aten
LORA = {"r": 2, "lora_alpha": 6, "init_lora_weights": False}
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


@dataclass(frozen=True, kw_only=True)
class BothConfig(AdapterConfig):
    peft_type: str = "BOTH"


class Both(Kind):
    """y = o ∘ ((i ∘ x) Wᵀ + b): the two equations look alike."""

    config = BothConfig

    def tensors(self, site, config):
        return {"i": Spec("both_i", (site.in_features,)), "o": Spec("both_o", (site.out_features,))}

    def init(self, site, config, tensors, rng, weight):
        for tensor in tensors.values():
            tensor.fill_(1)

    def before(self, x, at):
        return aten.mul.Tensor(x, at.i)

    def after(self, y, x, at):
        return aten.mul.Tensor(y, at.o)

    def changes(self, site, config):
        return ("weight", "bias") if site.has_bias else ("weight",)

    def merged(self, name, base, at):
        return at.o[:, None] * base * at.i if name == "weight" else at.o * base


@pytest.fixture(autouse=True)
def both_known():
    kinds.register(Both)
    yield
    del kinds.KINDS["BOTH"]


ORDERS = [["both"], ["lora", "both"], ["both", "ia3"], ["ia3", "both", "lora"]]


@pytest.mark.parametrize("capture", [pytest.param("graph", marks=pytest.mark.slow), "sites"])
@pytest.mark.parametrize("order", cases(ORDERS, quick=ORDERS[3:]))
def test_a_kind_on_both_sides_is_taken_away_whole(order, capture):
    model, x = nn.Sequential(nn.Linear(6, 6)).double(), torch.randn(4, 6, dtype=torch.float64)
    targets = {"target_modules": ["0"]}
    lora = lorafx.compile(model, BothConfig(**targets), adapter_name="both", capture=capture)
    lora.add_adapter("lora", LORA | targets)
    lora.add_adapter("ia3", Ia3Config(**targets))
    for name in ("both", "lora", "ia3"):
        randomize(lora, name)
    lora.set_adapter(order)
    expected = lora(x)
    for name in order:
        lora.merge_adapter([name])
        torch.testing.assert_close(lora(x), expected, **CLOSE)
    torch.testing.assert_close(model(x), expected, **CLOSE)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.att = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x, c):
        return self.att(x, c, c)[0]


class Turned(nn.Module):
    """A linear layer, and a `Conv1D` that stores the same weight the other way round."""

    def __init__(self):
        super().__init__()
        self.linear, self.conv = nn.Linear(5, 7), Conv1D(5, 7)
        self.conv.weight = self.linear.weight

    def forward(self, x, _):
        return self.conv(torch.tanh(self.linear(x)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*one site")
@pytest.mark.parametrize(
    ("model", "targets", "width"), [(Attention, ["att"], 8), (Turned, ["linear"], 5), (Turned, ["conv"], 5)]
)
def test_a_weight_that_is_read_in_parts_or_turned_is_merged_and_called(model, targets, width):
    model = model().double()
    x, c = torch.randn(2, 4, width, dtype=torch.float64), torch.randn(2, 3, width, dtype=torch.float64)
    lora = lorafx.compile(model, LORA | {"target_modules": targets})
    expected = lora(x, c)
    lora.merge_adapter()
    torch.testing.assert_close(lora(x, c), expected, **CLOSE)
    torch.testing.assert_close(model(x, c), expected, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, pytest.param(lambda lora: pickle.loads(pickle.dumps(lora)), marks=pytest.mark.slow)]
)
def test_a_copy_merges_old_and_new_adapters_into_one_weight(copied):
    model, x = nn.Sequential(nn.Conv1d(2, 5, 2), nn.Flatten(), nn.Linear(15, 7)).double(), torch.randn(3, 2, 4).double()
    lora = copied(lorafx.compile(model, LORA | {"target_modules": ["0", "2"]}))
    lora.add_adapter("b", LORA | {"target_modules": ["0", "2"]})
    lora.set_adapter(["default", "b"])
    expected = lora(x)
    lora.merge_adapter()
    torch.testing.assert_close(lora(x), expected, **CLOSE)
    assert len(lora._lorafx.ledger.entries) == 2


@pytest.mark.filterwarnings("ignore:.*one site")
def test_a_gain_on_a_weight_of_modules_with_biases_of_their_own_is_not_merged():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    lora = lorafx.compile(model, Ia3Config(target_modules=["0"]))
    with pytest.raises(MergeError, match="0 shares its weight with 1, which has a bias of its own"):
        lora.merge_adapter()


def test_a_gain_on_a_module_that_another_is_like_in_all_is_merged():
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double(), torch.randn(3, 6, dtype=torch.float64)
    model[1].weight, model[1].bias = model[0].weight, model[0].bias
    lora = lorafx.compile(model, Ia3Config(target_modules=["0"]))
    randomize(lora, "default")
    before = lora(x)
    lora.merge_adapter()
    torch.testing.assert_close(lora(x), before, **CLOSE)


def test_disabling_for_a_while_puts_merged_adapters_back_in_their_order():
    model, x = nn.Sequential(nn.Linear(6, 7)).double(), torch.randn(3, 6, dtype=torch.float64)
    lora = lorafx.compile(model, LORA | {"target_modules": ["0"]})
    lora.add_adapter("ia3", Ia3Config(target_modules=["0"]))
    randomize(lora, "ia3")
    lora.merge_adapter()
    lora.merge_adapter(["ia3"])
    expected, order = lora(x), lora.merged_adapters
    with lora.disable_adapter():
        pass
    assert lora.merged_adapters == order == ["default", "ia3"]
    torch.testing.assert_close(lora(x), expected, **CLOSE)


def test_a_merged_weight_of_another_shape_is_refused(monkeypatch):
    model = nn.Sequential(nn.Linear(6, 7))
    lora, before = lorafx.compile(model, BothConfig(target_modules=["0"])), model[0].weight.clone()
    monkeypatch.setattr(Both, "merged", lambda self, name, base, at: base[:1])
    with pytest.raises(MergeError, match=r"0\.weight: adapter 'default' would make \(1, 6\) of it"):
        lora.merge_adapter()
    assert torch.equal(model[0].weight, before)


def test_an_equation_that_cannot_be_computed_names_the_site_and_the_kind():
    lora = lorafx.compile(nn.Sequential(nn.Embedding(11, 4)), BothConfig(target_modules=["0"]))
    with pytest.raises(ConfigError, match="site 0: the equation of BOTH cannot be computed"):
        lora(torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("name", ["x", "training", "dtype", "narrow"])
def test_a_tensor_cannot_be_called_as_something_else_is(name, monkeypatch):
    monkeypatch.setattr(Both, "tensors", lambda self, site, config: {name: Spec("both", (site.in_features,))})
    model = nn.Sequential(nn.Linear(6, 7))
    with pytest.raises(ConfigError, match=f"cannot call their tensors or numbers {name}; BOTH does"):
        lorafx.compile(model, BothConfig(target_modules=["0"]))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_plain_config_that_says_its_type_is_of_that_kind():
    lora = lorafx.compile(nn.Sequential(nn.Linear(6, 7)), AdapterConfig(peft_type="LORA", target_modules=["0"]))
    assert type(lora.peft_config["default"]) is lorafx.LoraConfig


def test_a_bias_that_the_module_adds_itself_takes_the_adapters():
    class Own(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    model, x = nn.Sequential(Own(6, 7)).double(), torch.randn(3, 6, dtype=torch.float64)
    lora = adapted(model, target_modules=["0"], lora_bias=True)
    expected = lora(x)
    lora.merge_adapter()
    torch.testing.assert_close(model(x), expected, **CLOSE)
    assert (expected - nn.functional.linear(x, model[0].weight)).abs().max() > 0
