"""restore_rotary: a rotary position embedding, which models write by hand, becomes one operator.

x · cos + [-b a] · sin,  [a b] = x             ->  rotary(x, cos, sin)
the same with a and b at even and odd places   ->  rotary(x, cos, sin, interleaved=True)

What the operator does is in `lorafx/ops/rotary.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from sys import maxsize
from typing import Any

import torch
from torch.fx import GraphModule, Node

from lorafx import ops  # noqa: F401, defines torch.ops.lorafx
from lorafx.graph import Match, Rule, within_vmap
from lorafx.pipeline import Context, Pass

aten = torch.ops.aten


def halves(x, dim, start, half, end):
    a, b = aten.slice.Tensor(x, dim, start, half), aten.slice.Tensor(x, dim, half, end)
    return aten.cat.default([aten.neg.default(b), a], -1)


def places(x, dim, start, half, end):
    a, b = aten.slice.Tensor(x, dim, start, end, 2), aten.slice.Tensor(x, dim, 1, end, 2)
    return aten.flatten.using_ints(aten.stack.default([aten.neg.default(b), a], -1), -2)


def written(turn: Callable[..., Any]) -> Callable[..., Any]:
    """The pattern with one of the two ways to pair elements."""

    def embedded(x, cos, sin, dim, start, half, end):
        return aten.add.Tensor(aten.mul.Tensor(x, cos), aten.mul.Tensor(turn(x, dim, start, half, end), sin))

    return embedded


def by_halves(x, cos, sin):
    return torch.ops.lorafx.rotary.default(x, cos, sin)


def by_places(x, cos, sin):
    return torch.ops.lorafx.rotary.default(x, cos, sin, True)


def _of_pairs(found: Match) -> str | None:
    bound = found.bindings
    if not isinstance(bound["cos"], Node) or not isinstance(bound["sin"], Node):
        return "cosine and sine are no tensors"
    x, cos, sin, result = (node.meta["val"] for node in (bound["x"], bound["cos"], bound["sin"], found.anchor))
    width = x.shape[-1]
    if within_vmap(bound["x"]):
        return "it is within a vmap"
    if bound["dim"] != x.ndim - 1 or bound["start"] not in (0, None) or bound["end"] not in (width, maxsize, None):
        return "its pairs are not those of the last dimension"
    if not isinstance(width, int) or width % 2 or bound.get("half", width // 2) * 2 != width:
        return "what it turns are no pairs"
    if {x.dtype, cos.dtype, sin.dtype} != {result.dtype} or result.shape != x.shape:
        return "one operator needs one dtype, and one shape"
    return None


RULES = Rule(written(halves), by_halves, _of_pairs), Rule(written(places), by_places, _of_pairs)


@dataclass(frozen=True)
class RestoreRotary(Pass):
    """Afterwards no rotary embedding in one dtype is written in slices and products."""

    exact = True
    requires = frozenset({"canonical"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        return sum(rule.apply_everywhere(gm, self.name) for rule in RULES)
