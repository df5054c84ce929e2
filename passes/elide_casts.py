"""elide_casts: a cast to the dtype a tensor already has is the tensor itself.

x.to(dtype)  ->  x        where x.dtype is dtype
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from lorafx.pipeline import Context, Pass
from lorafx.rewrite import Match, Rule, fake_mode_of

aten = torch.ops.aten


def cast(x, dtype, non_blocking, copy, memory_format):
    return aten.to.dtype(x, dtype, non_blocking, copy, memory_format)


def same(x, dtype, non_blocking, copy, memory_format):
    return x


def _changes_nothing(found: Match) -> str | None:
    bound = found.bindings
    if bound["copy"] or bound["memory_format"] is not None:
        return "the cast asks for a copy"
    has = bound["x"].meta["val"].dtype
    return None if has == bound["dtype"] else f"the cast changes {has} to {bound['dtype']}"


RULE = Rule(cast, same, _changes_nothing)


@dataclass(frozen=True)
class ElideCasts(Pass):
    """Afterwards every cast changes a dtype."""

    requires = frozenset({"canonical"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        return RULE.apply_everywhere(gm, self.name, fake_mode_of(gm))
