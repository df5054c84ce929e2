"""elide_casts: a cast to the dtype a tensor already has is the tensor itself.

x.to(dtype)  ->  x        where x has that dtype already (and the device and layout that are asked for)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from lorafx.graph import Match, Rule, within_vmap
from lorafx.pipeline import Context, Pass

aten = torch.ops.aten


def cast(x, dtype, non_blocking, copy, memory_format):
    return aten.to.dtype(x, dtype, non_blocking, copy, memory_format)


def cast_or_move(x, dtype, layout, device, pin_memory, non_blocking, copy, memory_format):
    return aten.to.dtype_layout(x, dtype, layout, device, pin_memory, non_blocking, copy, memory_format)


def same(x):
    return x


def _changes_nothing(found: Match) -> str | None:
    bound = found.bindings
    if bound["copy"] or bound["memory_format"] is not None:
        return "the cast asks for a copy"
    if within_vmap(bound["x"]):
        return "it is within a vmap"
    x = bound["x"].meta["val"]
    asked = {name: bound[name] for name in ("dtype", "layout", "device") if bound.get(name) is not None}
    changed = (f"{getattr(x, name)} to {value}" for name, value in asked.items() if getattr(x, name) != value)
    changes = ", ".join(changed)
    return f"the cast changes {changes}" if changes else None


RULES = Rule(cast, same, _changes_nothing), Rule(cast_or_move, same, _changes_nothing)


@dataclass(frozen=True)
class ElideCasts(Pass):
    """Afterwards every cast changes dtype, device or layout, or makes a copy that was asked for."""

    exact = True
    requires = frozenset({"canonical"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        return sum(rule.apply_everywhere(gm, self.name) for rule in RULES)
