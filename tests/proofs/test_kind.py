"""A kind from outside the package: IA3 (Liu et al., 2022, arXiv 2205.05638), which multiplies instead of adding.

y = l ∘ (x Wᵀ + b)          W' = diag(l) W, b' = l ∘ b          for most layers
y = (l ∘ x) Wᵀ + b          W' = W diag(l)                      for those that `feedforward_modules` names
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from uses import Layers, hold

from lorafx.adapters import kinds
from lorafx.adapters.config import AdapterConfig
from lorafx.adapters.kinds import Kind, Spec

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Ia3Config(AdapterConfig):
    peft_type: str = "OUTSIDE"
    feedforward_modules: tuple[str, ...] = ()


class Ia3(Kind):
    config = Ia3Config

    def tensors(self, site, config):
        shape = (1, site.in_features) if _scales_inputs(site, config) else (site.out_features, 1)
        return {"l": Spec("ia3_l", shape)}

    def init(self, site, config, tensors, rng, weight):
        tensors["l"].fill_(1)

    def before(self, x, at):
        return aten.mul.Tensor(x, aten.view.default(at.l, [-1])) if _scales_inputs(at.site, at.config) else x

    def after(self, y, x, at):
        return y if _scales_inputs(at.site, at.config) else aten.mul.Tensor(y, aten.view.default(at.l, [-1]))

    def changes(self, site, config):
        return ("weight", "bias") if site.has_bias and not _scales_inputs(site, config) else ("weight",)

    def merged(self, name, base, at):
        return base * (at.l if name == "weight" else at.l.flatten())

    def unmerged(self, name, merged, at):
        return merged / (at.l if name == "weight" else at.l.flatten())


def _scales_inputs(site, config):
    return site.name.rpartition(".")[2] in config.feedforward_modules


@pytest.fixture(autouse=True)
def known():
    """The kind is known during a test alone."""
    kinds.register(Ia3)
    yield
    del kinds.KINDS["OUTSIDE"]


class TwoLinears(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 5, bias=False)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def formula(lora, x):
    for layer in lora.layers:
        up, down = layer.up, layer.down
        hidden = torch.relu((x @ up.weight.T + up.bias) * up.ia3_l.default.flatten())
        x = x + torch.tanh((hidden * down.ia3_l.default.flatten()) @ down.weight.T)
    return x


@pytest.mark.slow
def test_a_kind_that_multiplies_is_used_like_one_that_adds(tmp_path):
    config = Ia3Config(target_modules=["up", "down"], feedforward_modules=["down"])
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    hold(lambda: Layers(TwoLinears).double(), config, x, formula, tmp_path)
