"""A kind that reads the weight, on a dense one and on one of 8 bits: a magnitude for each row, whatever its norm was.

W' = diag(m / ‖W‖) W          m (out,), starts as the rows' norms, so that nothing changes
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from test_storage import Int8Linear, Int8Rows
from torch import nn
from uses import Layers, hold

import lorafx
from lorafx.adapters import kinds, storages
from lorafx.adapters.config import AdapterConfig
from lorafx.adapters.kinds import Kind, Spec
from lorafx.errors import ConfigError

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class MagnitudeConfig(AdapterConfig):
    peft_type: str = "MAGNITUDE"


class Magnitude(Kind):
    config = MagnitudeConfig
    reads_weight = True

    def tensors(self, site, config):
        return {"m": Spec("magnitude_m", (site.out_features,))}

    def init(self, site, config, tensors, rng, weight):
        tensors["m"].copy_(weight.norm(dim=1))

    def after(self, y, x, at):
        gain = aten.sub.Tensor(aten.div.Tensor(at.m, aten.linalg_vector_norm.default(at.weight, 2, [1])), 1)
        return aten.add.Tensor(y, aten.linear.default(x, aten.mul.Tensor(at.weight, aten.unsqueeze.default(gain, 1))))

    def merged(self, name, base, at):
        return base * (at.m / base.norm(dim=1))[:, None]


@pytest.fixture(autouse=True)
def known():
    """The kind, and the storage, are known during a test alone."""
    kinds.register(Magnitude)
    storage = storages.register(Int8Rows())
    yield
    storages.STORAGES.remove(storage)
    del kinds.KINDS["MAGNITUDE"]


def dense(layer):
    return layer.weight * layer.scale[:, None] if hasattr(layer, "scale") else layer.weight


class TwoLinears(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.up, self.down = linear(5, 7), linear(7, 5)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def formula(lora, x):
    def adapted(layer, x):
        weight = dense(layer)
        gain = layer.magnitude_m.default / weight.norm(dim=1)
        return x @ (weight * gain[:, None]).T + layer.bias

    for layer in lora.layers:
        x = x + torch.tanh(adapted(layer.down, torch.relu(adapted(layer.up, x))))
    return x


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is stored as int8 by rows")
@pytest.mark.parametrize("linear", [nn.Linear, Int8Linear])
def test_it_is_used_like_one_that_does_not(linear, tmp_path):
    near = 0.1 if linear is Int8Linear else 1e-12  # a step of 8 bits is 1/127 of a row's largest
    config = MagnitudeConfig(target_modules=["up", "down"])
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    hold(lambda: Layers(lambda: TwoLinears(linear)).double(), config, x, formula, tmp_path, merges_to=near)


def test_it_starts_as_the_weight_is():
    model, x = Layers(lambda: TwoLinears(nn.Linear)).double(), torch.randn(4, 5, dtype=torch.float64)
    lora = lorafx.compile(model, MagnitudeConfig(target_modules=["up", "down"]))
    torch.testing.assert_close(lora(x), model(x), rtol=1e-12, atol=1e-12)


def test_another_adapter_inside_of_it_is_refused():
    lora = lorafx.compile(nn.Sequential(nn.Linear(5, 7)), {"target_modules": ["0"]}, adapter_name="lora")
    lora.add_adapter("magnitude", MagnitudeConfig(target_modules=["0"]))
    lora.set_adapter(["magnitude", "lora"])
    lora(torch.randn(2, 5))
    lora.set_adapter(["lora", "magnitude"])
    with pytest.raises(ConfigError, match="'magnitude' needs the weight, and lora inside of it changes"):
        lora(torch.randn(2, 5))
    lora.merge_adapter(["lora"])  # now the weight is what it is given
    assert lora(torch.randn(2, 5)).shape == (2, 7)
