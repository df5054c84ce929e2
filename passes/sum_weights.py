"""sum_weights: an update by a matrix as large as the weight is added to the weight, and not to the result.

x Wᵀ + b + s · x Mᵀ  ->  x (W + s · M)ᵀ + b

So a kind that makes its whole ΔW costs three products in a training step, where it would be five: forward one instead
of two, and as many for the gradient of x. In half precision W + M would lose what is small beside W, so it is for
float32 and float64 alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from lorafx.graph import Match, Rule, made_by, rewrite_updates
from lorafx.ops.modes import autocast_dtype
from lorafx.pipeline import Context, Pass

aten = torch.ops.aten


def apart(x, weight, bias, update):
    return aten.add.Tensor(aten.linear.default(x, weight, bias), aten.linear.default(x, update))


def together(x, weight, bias, update):
    return aten.linear.default(x, aten.add.Tensor(weight, update), bias)


def apart_scaled(x, weight, bias, update, scaling):
    product = aten.mul.Tensor(aten.linear.default(x, update), scaling)
    return aten.add.Tensor(aten.linear.default(x, weight, bias), product)


def together_scaled(x, weight, bias, update, scaling):
    return aten.linear.default(x, aten.add.Tensor(weight, aten.mul.Tensor(update, scaling)), bias)


def _of_one_kind(found: Match) -> str | None:
    maker = made_by(found.anchor)
    if maker is None or not maker.adapter:
        return "no adapter adds this"
    x, weight, update = (found.bindings[name].meta["val"] for name in ("x", "weight", "update"))
    if found.bindings["weight"].op != "get_attr" or weight.shape != update.shape:
        return "these are no weight and an update of its shape"
    dtypes = {x.dtype, weight.dtype, update.dtype, found.anchor.meta["val"].dtype}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64} or autocast_dtype(x.device.type):
        return "a sum of weights would round what a sum of results does not"
    return None


def _of_one_kind_and_number(found: Match) -> str | None:
    scaling = found.bindings["scaling"]
    if isinstance(scaling, Node) and scaling.meta["val"].ndim:
        return "the scaling is one of many numbers"
    return _of_one_kind(found)


RULES = Rule(apart, together, _of_one_kind), Rule(apart_scaled, together_scaled, _of_one_kind_and_number)


@dataclass(frozen=True)
class SumWeights(Pass):
    """Afterwards no linear operator has an update by a matrix of its weight's size beside it, but where this rounds."""

    exact = True
    requires = frozenset({"adapters"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        return rewrite_updates(RULES, gm, self.name)
