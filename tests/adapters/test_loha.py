"""LoHa where PEFT's derivative is none, and the dropouts, which draw other random numbers than PEFT's."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lorafx
from lorafx.errors import ConfigError

CORE = lorafx.LoHaConfig(r=2, alpha=3, target_modules=["0"], use_effective_conv2d=True, init_weights=False)


def factor(layer, i):
    t, a, b = (getattr(layer, f"hada_{name}").default for name in (f"t{i}", f"w{i}_a", f"w{i}_b"))
    return torch.einsum("ijk,ip,jq->pqk", t.flatten(2), a, b)


@pytest.mark.parametrize("conv", [nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, (3, 1)), nn.Conv3d(4, 6, (1, 2, 1))], ids=repr)
def test_the_derivative_is_that_of_the_equation(conv):
    model = nn.Sequential(conv).double()
    lora = lorafx.compile(model, CORE)
    x = torch.randn(2, 4, *[5] * (conv.weight.ndim - 2), dtype=torch.float64)
    function = (F.conv1d, F.conv2d, F.conv3d)[conv.weight.ndim - 3]
    weight = conv.weight + 1.5 * (factor(lora[0], 1) * factor(lora[0], 2)).view(conv.weight.shape)
    expected = function(x, weight, conv.bias)
    torch.testing.assert_close(lora(x), expected, rtol=1e-12, atol=1e-12)
    trained = [p for p in lora.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(expected.square().sum(), trained)
    for ours, gradient in zip(torch.autograd.grad(lora(x).square().sum(), trained), wanted):
        torch.testing.assert_close(ours, gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("capture", ["graph", "sites"])
def test_dropout_drops_rows_and_calls(capture):
    model, x = nn.Sequential(nn.Linear(8, 64)).double(), torch.randn(3, 8, dtype=torch.float64)
    config = lorafx.LoHaConfig(r=1, target_modules=["0"], init_weights=False, rank_dropout=0.25)
    lora = lorafx.compile(model, config, capture=capture)
    whole = (lora.eval()(x) - model(x)).detach()
    ratio = (lora.train()(x) - model(x)).detach() / whole
    kept = ratio[0] != 0
    assert 32 < kept.sum() < 64, "a quarter of 64 rows, give or take"
    torch.testing.assert_close(ratio, kept * 64 / kept.sum() + torch.zeros_like(ratio), rtol=1e-8, atol=1e-8)

    model = nn.Sequential(nn.Linear(8, 64)).double()
    lora = lorafx.compile(model, config.replace(rank_dropout=0.0, module_dropout=0.5), capture=capture)
    calls = [bool((lora(x) - model(x)).abs().max() > 0) for _ in range(40)]
    assert 5 < sum(calls) < 35


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "`r` must be a positive int"),
        ({"alpha": "8"}, "`alpha` must be a number"),
        ({"rank_dropout": 1.0}, "`rank_dropout` must be a number in"),
        ({"init_weights": "lycoris"}, "`init_weights` must be True or False"),
        ({"rank_pattern": {"a": 0}}, "`rank_pattern` must be"),
    ],
)
def test_a_wrong_field_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        lorafx.LoHaConfig(**changes)


def test_embeddings_are_refused():
    with pytest.raises(ConfigError, match="0 is an embedding, for which there is no LoHa"):
        lorafx.compile(nn.Sequential(nn.Embedding(5, 3)), lorafx.LoHaConfig(target_modules=["0"]))
