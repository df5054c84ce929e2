"""elide_slices: a slice of the whole tensor is the tensor itself.

x[0 : 2⁶³ - 1]  ->  x        `x[:, None]` and `x[:, :, n:]` are captured with such slices
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from lorafx.graph import Match, Rule, within_vmap
from lorafx.pipeline import Context, Pass

aten = torch.ops.aten


def sliced(x, dim, start, end, step):
    return aten.slice.Tensor(x, dim, start, end, step)


def same(x):
    return x


def _takes_all(found: Match) -> str | None:
    bound = found.bindings
    if within_vmap(bound["x"]):
        return "it is within a vmap"
    takes_all = (bound["start"], bound["end"], bound["step"]) == (0, sys.maxsize, 1)
    return None if takes_all else f"it takes {bound['start']}:{bound['end']}:{bound['step']}"


RULE = Rule(sliced, same, _takes_all)


@dataclass(frozen=True)
class ElideSlices(Pass):
    """Afterwards no slice goes from 0 to the end in steps of 1."""

    exact = True
    requires = frozenset({"canonical"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        return RULE.apply_everywhere(gm, self.name)
