"""MiSS: the equations of its forms, and what each of them needs."""

import pytest
import torch
from torch import nn
from uses import Layers, Pair, hold, of_layers

import lorafx
from lorafx.errors import ConfigError

TARGETS = {"target_modules": ["up", "down"]}


def balanced(layer, x):
    block = layer.miss_block.default
    columns = block if block.shape[1] == layer.weight.shape[0] else block.repeat(1, layer.weight.shape[0])
    delta = torch.stack([columns[i % len(columns)] for i in range(layer.weight.shape[1])], 1)
    return x @ (layer.weight + delta).T + layer.bias


def bat(layer, x):
    block, delta = layer.miss_block.default, torch.zeros_like(layer.weight)
    r = block.shape[1]
    for j in range(layer.weight.shape[0] // r):
        for i in range(layer.weight.shape[1] // r):
            rows, columns = slice(j * r, (j + 1) * r), slice(i * r, (i + 1) * r)
            delta[rows, columns] = layer.weight[rows, columns] @ block[j] + block[j]
    return x @ (layer.weight + delta).T + layer.bias


def even(inputs, outputs):
    return nn.Linear(6 if inputs == 5 else 4, 6 if outputs == 5 else 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "linear", "adapted"),
    [
        ({"r": 3}, nn.Linear, balanced),
        ({"r": 2, "init_weights": "bat"}, even, bat),
    ],
)
def test_its_equation_holds_in_every_use(fields, linear, adapted, tmp_path):
    x = torch.randn(4, 6, 5 if linear is nn.Linear else 6, dtype=torch.float64)
    config = lorafx.MissConfig(**fields, **TARGETS)
    hold(lambda: Layers(lambda: Pair(linear)).double(), config, x, of_layers(adapted), tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 8}, "`r`=8 is more than the 5 features"),
        ({"r": 2, "mini_r": 4, "init_weights": "mini"}, "`mini_r`=4 does not divide the 7 rows"),
        ({"r": 2, "init_weights": "bat"}, r"0 is \(7, 5\), and blocks of `r`=2"),
    ],
)
def test_what_does_not_fit_a_layer_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        lorafx.compile(nn.Sequential(nn.Linear(5, 7)), lorafx.MissConfig(**fields, target_modules=["0"]))


def test_a_dropout_in_vain_is_said():
    with pytest.warns(UserWarning, match="`miss_dropout` has no effect"):
        config = lorafx.MissConfig(r=2, init_weights="bat", miss_dropout=0.5, target_modules=["0"])
        lorafx.compile(nn.Sequential(nn.Linear(4, 6)), config)


@pytest.mark.parametrize("form", [False, "bat"])
def test_it_acts_on_a_quantised_layer(form):
    bnb = pytest.importorskip("bitsandbytes")
    model, x = nn.Sequential(bnb.nn.Linear4bit(64, 96, compute_dtype=torch.float32)).to("cpu"), torch.ones(1, 64)
    lora = lorafx.compile(model, lorafx.MissConfig(r=2, init_weights=form, target_modules=["0"]))
    if form == "bat":
        with torch.no_grad():
            lora[0].miss_block.default.fill_(0.5)  # ΔW = W B + B: each number is half its pair's sum, plus a half
        expected = model(x) - model[0].bias + 32
    else:
        expected = 32 * lora[0].miss_block.default.sum(0)[None]
    torch.testing.assert_close(lora(x) - model(x), expected, rtol=1e-4, atol=1e-4)  # sums of 64 in float32, twice
