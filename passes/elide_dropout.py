"""elide_dropout: dropout that drops nothing is its input.

dropout(x, p, training)  ->  x        where p = 0, or not training
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from lorafx.graph import Match, Rule
from lorafx.pipeline import Context, Pass


def dropout(x, p, training):
    return torch.ops.aten.dropout.default(x, p, training)


def same(x, p, training):
    return x


def _drops_nothing(found: Match) -> str | None:
    p, training = found.bindings["p"], found.bindings["training"]
    return f"p={p} of the values are dropped in training" if p and training else None


RULE = Rule(dropout, same, _drops_nothing)


@dataclass(frozen=True)
class ElideDropout(Pass):
    """Afterwards every dropout drops something."""

    exact = True
    requires = frozenset({"adapters"})
    establishes = frozenset({"lean"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        return RULE.apply_everywhere(gm, self.name)
