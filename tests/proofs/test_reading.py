"""A reading from outside the package: a batched product, whose weight has a matrix for each expert.

y[e] = x[e] W[e]          W (experts, in, out), and an adapter A (experts, r, in), B (experts, out, r) for each
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from uses import Layers, hold

from lorafx.adapters import readings
from lorafx.adapters.readings import Operator, Reading

aten = torch.ops.aten


class Experts(nn.Module):
    """(experts, tokens, in) -> (experts, tokens, out)"""

    def __init__(self, experts, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, inputs, outputs) / inputs**0.5)

    def forward(self, x):
        return torch.bmm(x, self.weight)


def batched(x, weight):
    return aten.bmm.default(x, weight)


def with_factor(x, factor):
    return aten.bmm.default(x, aten.transpose.int(factor, 1, 2))


@dataclass(frozen=True, repr=False)
class OfExperts(Reading):
    matrix: bool = False

    def features(self, shape, groups):
        return shape[1], shape[2]

    def factors(self, shape, groups, rank):
        experts, inputs, outputs = shape
        return (experts, rank, inputs), (experts, outputs, rank)

    def product(self, a, b, shape):
        return (b @ a).transpose(1, 2)


EXPERTS = OfExperts("experts", (Experts,), (Operator(batched, with_factor, with_factor, transposed=True),))


@pytest.fixture(autouse=True)
def known():
    """The reading is known during a test alone."""
    readings.register(EXPERTS)
    yield
    readings.READINGS.remove(EXPERTS)


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = Experts(3, 5, 7), Experts(3, 7, 5)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def formula(lora, x):
    def adapted(layer, x):
        a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
        update = torch.einsum("eti,eri,eor->eto", x, a, b)
        return torch.einsum("eti,eio->eto", x, layer.weight) + 3 * update

    for layer in lora.layers:
        x = x + torch.tanh(adapted(layer.down, torch.relu(adapted(layer.up, x))))
    return x


@pytest.mark.slow
def test_a_weight_of_three_dimensions_has_an_adapter_for_each_expert(tmp_path):
    config = {"r": 2, "lora_alpha": 6, "target_modules": ["up", "down"], "init_lora_weights": False}
    x = torch.randn(3, 6, 5, dtype=torch.float64)
    hold(lambda: Layers(TwoLayers).double(), config, x, formula, tmp_path)
