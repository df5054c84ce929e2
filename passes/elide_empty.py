"""elide_empty: a tensor that is joined to an empty one, of shape (0,), is the result.

cat([∅, x])  ->  x        as the first call with a key-value cache that is still empty does

`cat` gives new memory, so the pass does nothing if the graph writes in place, or if x may be an input or a parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from lorafx.graph import Match, Rule, within_vmap, writes
from lorafx.graph.effects import drop_dead, source_of
from lorafx.pipeline import Context, Pass

aten = torch.ops.aten


def joined(empty, x, dim):
    return aten.cat.default([empty, x], dim)


def alone(x):
    return x


def _is_of_no_elements(found: Match) -> str | None:
    empty, x = found.bindings["empty"], found.bindings["x"]
    if within_vmap(x):
        return "it is within a vmap"
    if tuple(empty.meta["val"].shape) != (0,) or empty.meta["val"].dtype != x.meta["val"].dtype:
        return "both have elements, or dtypes differ"
    return None if source_of(x).op == "call_function" else "the other tensor is there after the call"


RULE = Rule(joined, alone, _is_of_no_elements)


@dataclass(frozen=True)
class ElideEmpty(Pass):
    """Afterwards, in a graph that writes nothing in place, no tensor that it computed is joined to an empty one."""

    exact = True
    requires = frozenset({"canonical"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        if any(writes(node, gm) for node in gm.graph.nodes):
            return 0
        count = RULE.apply_everywhere(gm, self.name)
        drop_dead(gm)
        return count
