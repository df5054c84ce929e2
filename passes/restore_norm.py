"""restore_norm: root mean square normalisation, which models write by hand, becomes one operator.

x · (mean(x²) + ε)^-½           ->  rms_norm(x, ε)
weight · rms_norm(x, ε)         ->  rms_norm(x, weight, ε)

Where the model casts to a wider dtype, and back before it multiplies by the weight, casts and product stay. What the
operator does is in `lorafx/ops/rms_norm.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from lorafx import ops  # noqa: F401, defines torch.ops.lorafx
from lorafx.graph import Match, Rule, within_vmap
from lorafx.pipeline import Context, Pass

aten = torch.ops.aten


def divided(x, eps):
    mean = aten.mean.dim(aten.pow.Tensor_Scalar(x, 2), [-1], True)
    return aten.mul.Tensor(x, aten.rsqrt.default(aten.add.Tensor(mean, eps)))


def normalized(x, eps):
    return torch.ops.lorafx.rms_norm.default(x, None, eps)


def weighted_left(x, weight, eps):
    return aten.mul.Tensor(weight, torch.ops.lorafx.rms_norm.default(x, None, eps))


def weighted_right(x, weight, eps):
    return aten.mul.Tensor(torch.ops.lorafx.rms_norm.default(x, None, eps), weight)


def normalized_and_weighted(x, weight, eps):
    return torch.ops.lorafx.rms_norm.default(x, weight, eps)


def _in_full_precision(found: Match) -> str | None:
    x, eps = found.bindings["x"], found.bindings["eps"]
    if within_vmap(x):
        return "it is within a vmap"
    if x.meta["val"].dtype not in (torch.float32, torch.float64):
        return f"the operator would be more exact than what is computed in {x.meta['val'].dtype}"
    if not isinstance(eps, (int, float)):
        return "epsilon is no number"
    return None


def _one_for_each_place(found: Match) -> str | None:
    x, weight = found.bindings["x"].meta["val"], found.bindings["weight"]
    weight = weight.meta["val"] if isinstance(weight, Node) else None
    if not isinstance(weight, torch.Tensor) or weight.dtype != x.dtype or (*weight.shape,) != (x.shape[-1],):
        return "what it is multiplied by is no weight for each place of a row"
    return None


RULES = (
    Rule(divided, normalized, _in_full_precision),
    Rule(weighted_left, normalized_and_weighted, _one_for_each_place),
    Rule(weighted_right, normalized_and_weighted, _one_for_each_place),
)


@dataclass(frozen=True)
class RestoreNorm(Pass):
    """Afterwards no RMS norm in full precision is written in powers and means."""

    exact = True
    requires = frozenset({"canonical"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        return sum(rule.apply_everywhere(gm, self.name) for rule in RULES)
