"""restore_gate: a gated activation that a model writes by hand is one operator.

silu(gate) · up                        ->  gated(gate, up, "silu")
gelu(gate) · up                        ->  gated(gate, up, "gelu")
gelu(gate, approximate="tanh") · up    ->  gated(gate, up, "gelu_tanh")

Whichever factor comes first, where nobody else reads the activation. What the operator does: `lorafx/ops/gated.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from lorafx import ops  # noqa: F401, defines torch.ops.lorafx
from lorafx.graph import Match, Rule, within_vmap
from lorafx.pipeline.pipeline import Context, Pass

aten = torch.ops.aten


def silu(gate):
    return aten.silu.default(gate)


def gelu(gate):
    return aten.gelu.default(gate)


def gelu_tanh(gate):
    return aten.gelu.default(gate, approximate="tanh")


def before(activation: Callable[..., Any]) -> Callable[..., Any]:
    """The pattern with the activation as the first factor."""

    def product(gate, up):
        return aten.mul.Tensor(activation(gate), up)

    return product


def behind(activation: Callable[..., Any]) -> Callable[..., Any]:
    """The pattern with the activation as the second factor."""

    def product(gate, up):
        return aten.mul.Tensor(up, activation(gate))

    return product


def operator(activation: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement for both."""

    def one(gate, up):
        return torch.ops.lorafx.gated.default(gate, up, activation.__name__)

    return one


def _alike(found: Match) -> str | None:
    gate, up = found.bindings["gate"], found.bindings["up"]
    if within_vmap(gate):
        return "it is within a vmap"
    gate, up = gate.meta["val"], up.meta["val"] if isinstance(up, Node) else None
    if not isinstance(up, torch.Tensor) or up.dtype != gate.dtype or _places(up) != _places(gate):
        return "what it is multiplied by is of another shape or dtype, or lies otherwise in memory"
    return None


def _places(tensor: torch.Tensor) -> str:
    """Sizes and strides, the same text for the same symbols."""
    return f"{tensor.shape} {tensor.stride()} {tensor.device}"


RULES = tuple(
    Rule(written(activation), operator(activation), _alike)
    for activation in (silu, gelu, gelu_tanh)
    for written in (before, behind)
)


@dataclass(frozen=True)
class RestoreGate(Pass):
    """Afterwards no gated activation is written as a product."""

    requires = frozenset({"canonical"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        return sum(rule.apply_everywhere(gm, self.name) for rule in RULES)
