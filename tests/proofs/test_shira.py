"""SHiRA: its equation, and the places that train."""

import pytest
import torch
from torch import nn
from uses import Layers, Pair, hold, of_layers

import lorafx
from lorafx.errors import ConfigError


def adapted(layer, x):
    rows, columns = layer.shira_indices.default
    weight = layer.weight.index_put((rows, columns), layer.shira_weight.default, accumulate=True)
    return x @ weight.T + layer.bias


@pytest.mark.slow
def test_its_equation_holds_in_every_use(tmp_path):
    config = lorafx.ShiraConfig(r=2, target_modules=["up", "down"])
    hold(lambda: Layers(Pair).double(), config, torch.randn(4, 6, 5, dtype=torch.float64), of_layers(adapted), tmp_path)


def test_places_are_distinct_and_those_of_the_seed():
    lora = lorafx.compile(Layers(Pair), lorafx.ShiraConfig(r=2, random_seed=3, target_modules=["up", "down"]))
    up, other, down = (
        layer.shira_indices.default for layer in (lora.layers[0].up, lora.layers[1].up, lora.layers[0].down)
    )
    assert up.dtype == torch.int32 and up.shape == (2, 24) and torch.equal(up, other)
    assert len({(int(row), int(column)) for row, column in down.T}) == 24
    assert down[0].max() < 5 and down[1].max() < 7, "rows of W, and columns"


def test_its_scale_is_a_number_that_can_be_set():
    model, x = nn.Sequential(nn.Linear(5, 7)), torch.randn(4, 5)
    lora = lorafx.compile(model, lorafx.ShiraConfig(r=2, target_modules=["0"], init_weights=False))
    change = lora(x) - model(x)
    lora.set_scale("default", 3.0)
    torch.testing.assert_close(lora(x) - model(x), 3 * change)


def test_a_gpt2_layer_is_merged_the_way_it_is_stored():
    from transformers.pytorch_utils import Conv1D

    model, x = nn.Sequential(Conv1D(7, 5)).double(), torch.randn(4, 5, dtype=torch.float64)
    lora = lorafx.compile(model, lorafx.ShiraConfig(r=2, target_modules=["0"], init_weights=False))
    expected = lora(x)
    lora.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_what_cannot_be_is_refused():
    model = nn.Sequential(nn.Linear(5, 7))
    with pytest.raises(ConfigError, match="`r`=3 asks for 36 numbers of 0, which has 35"):
        lorafx.compile(model, lorafx.ShiraConfig(r=3, target_modules=["0"]))
    with pytest.raises(ConfigError, match="mask_type"):
        lorafx.compile(model, lorafx.ShiraConfig(r=1, mask_type="mine", target_modules=["0"]))
    assert all(parameter.requires_grad for parameter in model.parameters())
