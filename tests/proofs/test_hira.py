"""HiRA: its equation on the layers that it acts on, and the weights that it needs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from uses import Layers, Pair, hold, of_layers, randomize

import lorafx
from lorafx.errors import ConfigError

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def adapted(layer, x):
    return x @ (layer.weight * (1 + layer.hira_B.default @ layer.hira_A.default)).T + layer.bias


@pytest.mark.slow
def test_its_equation_holds_in_every_use(tmp_path):
    config = lorafx.HiraConfig(r=2, rank_pattern={"down": 3}, target_modules=["up", "down"])
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    hold(lambda: Layers(Pair).double(), config, x, of_layers(adapted), tmp_path)


@pytest.mark.parametrize("capture", [pytest.param("graph", marks=pytest.mark.slow), "sites"])
def test_convolutions_and_embeddings_have_it_too(capture):
    model = nn.Sequential(nn.Embedding(11, 4), nn.Conv1d(6, 3, 2, stride=2, padding=1)).double()
    x = torch.randint(11, (2, 6))
    lora = lorafx.compile(model, lorafx.HiraConfig(r=2, target_modules=["0", "1"]), capture=capture)
    torch.testing.assert_close(lora(x), model(x), **CLOSE)
    randomize(lora)
    table, conv = lora[0], lora[1]
    rows = table.weight * (1 + (table.hira_embedding_B.default @ table.hira_embedding_A.default).T)
    product = conv.hira_B.default.flatten(1) @ conv.hira_A.default.flatten(1)
    expected = F.conv1d(rows[x], conv.weight * (1 + product.view_as(conv.weight)), conv.bias, 2, 1)
    torch.testing.assert_close(lora(x), expected, **CLOSE)
    lora.merge_adapter()
    torch.testing.assert_close(model(x), expected, **CLOSE)


def test_a_quantised_weight_is_made_dense():
    bnb = pytest.importorskip("bitsandbytes")
    model, x = nn.Sequential(bnb.nn.Linear4bit(64, 96, compute_dtype=torch.float32)).to("cpu"), torch.randn(4, 64)
    lora = lorafx.compile(model, lorafx.HiraConfig(r=2, init_weights=False, target_modules=["0"]))
    dense = bnb.functional.dequantize_4bit(model[0].weight, model[0].weight.quant_state)
    update = x @ (dense * (lora[0].hira_B.default @ lora[0].hira_A.default)).T
    torch.testing.assert_close(lora(x) - model(x), update, rtol=1e-4, atol=1e-4)  # sums of 64 in float32, twice


def test_layers_that_it_has_no_equation_for_are_refused():
    with pytest.raises(ConfigError, match="0 is a convolution of 2 groups"):
        lorafx.compile(nn.Sequential(nn.Conv1d(4, 6, 1, groups=2)), lorafx.HiraConfig(r=2, target_modules=["0"]))
