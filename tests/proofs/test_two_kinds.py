"""Two kinds on one site: the first is innermost, and the second wraps it. Against the formula, in float64."""

import pytest
import torch
from test_kind import Ia3Config, known  # noqa: F401, the fixture that makes the kind known
from torch import nn
from uses import bits, randomize

import lorafx
from lorafx.errors import MergeError


@pytest.fixture(params=["outputs", "inputs"])
def scaled(request):
    return request.param


@pytest.fixture
def lora(scaled):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh()).double()
    targets = {"target_modules": ["0"]}
    lora = lorafx.compile(model, {**targets, "r": 2, "lora_alpha": 6, "init_lora_weights": False}, adapter_name="lora")
    lora.add_adapter("ia3", Ia3Config(**targets, feedforward_modules=("0",) if scaled == "inputs" else ()))
    for name in ("lora", "ia3"):
        randomize(lora, name)
    return lora


def formula(lora, x, order, scaled):
    layer = lora[0]
    gain, a, b = layer.ia3_l.ia3.flatten(), layer.lora_A.lora.weight, layer.lora_B.lora.weight
    inner = x * gain if scaled == "inputs" else x
    update, base = 3 * (x @ a.T) @ b.T, inner @ layer.weight.T + layer.bias
    if order == ["lora", "ia3"]:  # the gain is outermost: it acts on the update too
        total = base + 3 * (inner @ a.T) @ b.T
        return torch.tanh(total if scaled == "inputs" else total * gain)
    return torch.tanh((base if scaled == "inputs" else base * gain) + update)


@pytest.mark.parametrize("capture", ["graph", "sites"])
@pytest.mark.parametrize("order", [["lora", "ia3"], ["ia3", "lora"]])
def test_the_second_wraps_the_first(lora, order, scaled, capture):
    x = torch.randn(4, 5, dtype=torch.float64)
    lora._lorafx.dispatcher.capture = capture
    lora._lorafx.dispatcher.clear()
    lora.set_adapter(order)
    expected = formula(lora, x, order, scaled)
    torch.testing.assert_close(lora(x), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(expected, formula(lora, x, order[::-1], scaled)), "the order makes a difference"


@pytest.mark.parametrize("order", [["lora", "ia3"], ["ia3", "lora"]])
def test_merged_they_are_what_they_were_in_that_order(lora, order, scaled):
    x, base = torch.randn(4, 5, dtype=torch.float64), lora._lorafx.base
    before = bits(base)
    lora.set_adapter(order)
    expected = formula(lora, x, order, scaled)
    for together in (True, False):
        if together:
            lora.merge_adapter(order[::-1])  # whatever order they are named in
        else:
            lora.merge_adapter(order[:1])
            torch.testing.assert_close(lora(x), expected, rtol=1e-12, atol=1e-12)
            lora.merge_adapter(order[1:])
        torch.testing.assert_close(base(x), expected, rtol=1e-12, atol=1e-12)
        lora.unmerge_adapter()
        assert bits(base) == before


def test_the_outer_one_cannot_be_merged_alone(lora):
    before = bits(lora._lorafx.base)
    lora.set_adapter(["lora", "ia3"])
    with pytest.raises(MergeError, match="'ia3' acts on what 'lora' gives"):
        lora.merge_adapter(["ia3"])
    assert bits(lora._lorafx.base) == before
