"""C3A: its equation, and sizes of blocks."""

import pytest
import torch
from torch import nn
from uses import Layers, Pair, hold, of_layers

import lorafx
from lorafx.errors import ConfigError


def adapted(layer, x):
    kernel = layer.c3a_kernel.default
    rows, columns, size = kernel.shape
    delta = torch.zeros_like(layer.weight)
    for row in range(rows * size):
        for column in range(columns * size):
            number = kernel[row // size, column // size, (column % size - row % size) % size]
            delta[row, column] = number / (columns * size)
    return x @ (layer.weight + delta).T + layer.bias


@pytest.mark.slow
def test_its_equation_holds_in_every_use(tmp_path):
    def linear(inputs, outputs):  # (6, 9) and (9, 6), of which 3 is a divisor
        return nn.Linear(inputs + 1 if inputs == 5 else 9, outputs + 1 if outputs == 5 else 9)

    config = lorafx.C3AConfig(block_size=3, target_modules=["up", "down"])
    x = torch.randn(4, 6, 6, dtype=torch.float64)
    hold(lambda: Layers(lambda: Pair(linear)).double(), config, x, of_layers(adapted), tmp_path)


@pytest.mark.parametrize("start", [True, False, "gaussian", "kaiming_uniform", "xavier_uniform"])
def test_it_starts_as_it_is_told(start):
    config = lorafx.C3AConfig(block_size=20, init_weights=start, target_modules=["0"])
    kernel = lorafx.compile(nn.Sequential(nn.Linear(40, 60)), config)[0].c3a_kernel.default
    wanted = {True: 0.0, "gaussian": 1.0, "kaiming_uniform": (1 / 40 / 3) ** 0.5}.get(start, (2 / 100) ** 0.5)
    assert kernel.shape == (3, 2, 20) and abs(kernel.std() - wanted) <= 0.2 * wanted


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match=r"0 is \(7, 5\), and `block_size`=5 does not divide both"):
        lorafx.compile(nn.Sequential(nn.Linear(5, 7)), lorafx.C3AConfig(block_size=5, target_modules=["0"]))
    with pytest.raises(ConfigError, match="init_weights"):
        lorafx.C3AConfig(init_weights="orthogonal")
