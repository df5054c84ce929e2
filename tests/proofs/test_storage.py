"""A storage from outside the package: integers of 8 bits with one scale a row.

W = diag(scale) Q        Q of int8, rounded so that the largest number of each row is 127
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from uses import Layers, hold

from lorafx.adapters import storages
from lorafx.adapters.readings import LINEAR
from lorafx.adapters.storages import Storage

aten = torch.ops.aten


class Int8Linear(nn.Module):
    """(…, in) -> (…, out)"""

    def __init__(self, inputs, outputs):
        super().__init__()
        linear = nn.Linear(inputs, outputs, dtype=torch.float64)
        packed, scale = quantised(linear.weight.detach())
        self.weight, self.bias = nn.Parameter(packed, requires_grad=False), linear.bias
        self.register_buffer("scale", scale)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale[:, None], self.bias)


def quantised(dense):
    scale = dense.abs().amax(1) / 127
    return (dense / scale[:, None]).round().to(torch.int8), scale


class Int8Rows(Storage):
    name, lossy = "int8 by rows", True

    def weights(self, module):
        if isinstance(module, Int8Linear):
            yield "weight", LINEAR

    def stored(self, module, parameter):
        return {"weight": module.weight, "scale": module.scale}

    def dtype(self, module, parameter):
        return module.scale.dtype

    @staticmethod
    def expression(weight, scale, dtype, non_blocking, copy, memory_format):
        cast = aten.to.dtype(weight, dtype, non_blocking, copy, memory_format)
        return aten.mul.Tensor(cast, aten.unsqueeze.default(scale, 1))

    def dense(self, stored):
        return stored["weight"] * stored["scale"][:, None]

    def packed(self, dense, stored):
        packed, scale = quantised(dense)
        return {"weight": packed, "scale": scale.to(stored["scale"].dtype)}


@pytest.fixture(autouse=True)
def known():
    """The storage is known during a test alone."""
    storage = storages.register(Int8Rows())
    yield
    storages.STORAGES.remove(storage)


class TwoLinears(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = Int8Linear(5, 7), Int8Linear(7, 5)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def formula(lora, x):
    def adapted(layer, x):
        update = (x @ layer.lora_A.default.weight.T) @ layer.lora_B.default.weight.T
        return x @ (layer.weight * layer.scale[:, None]).T + layer.bias + 3 * update

    for layer in lora.layers:
        x = x + torch.tanh(adapted(layer.down, torch.relu(adapted(layer.up, x))))
    return x


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is stored as int8 by rows")
def test_a_packed_weight_is_used_like_a_dense_one(tmp_path):
    """Merged, each weight is off by at most half a step, 1/254 of its row's largest, which is about 1 here."""
    config = {"r": 2, "lora_alpha": 6, "target_modules": ["up", "down"], "init_lora_weights": False}
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    hold(lambda: Layers(TwoLinears), config, x, formula, tmp_path, merges_to=0.1)
