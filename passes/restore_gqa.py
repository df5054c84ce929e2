"""restore_gqa: attention whose heads share keys and values reads them where they are, not repeated for each head.

sdpa(q, repeat(k, n), repeat(v, n))  ->  sdpa(q, k, v, enable_gqa=True)     grouped-query attention (arXiv 2305.13245)

Only where there is no mask: with one, no fused kernel takes heads that share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from lorafx.graph import Match, Rule
from lorafx.pipeline import Context, Pass

aten = torch.ops.aten


def repeated(q, k, v, k_expanded, k_heads, v_expanded, v_heads, dropout, causal, scale):
    keys = aten.reshape.default(aten.expand.default(aten.unsqueeze.default(k, 2), k_expanded), k_heads)
    values = aten.reshape.default(aten.expand.default(aten.unsqueeze.default(v, 2), v_expanded), v_heads)
    return aten.scaled_dot_product_attention.default(q, keys, values, None, dropout, causal, scale=scale)


def shared(q, k, v, dropout, causal, scale):
    return aten.scaled_dot_product_attention.default(q, k, v, None, dropout, causal, scale=scale, enable_gqa=True)


def _repeats_heads(found: Match) -> str | None:
    heads = found.bindings["q"].meta["val"].shape[1]
    for name in ("k", "v"):
        shape, expanded = found.bindings[name].meta["val"].shape, found.bindings[f"{name}_expanded"]
        repeats = len(shape) == 4 and expanded[1] in (-1, shape[1]) and isinstance(expanded[2], int)
        if not repeats or shape[1] * expanded[2] != heads:
            return f"{name} is repeated in another way"
    return None


RULE = Rule(repeated, shared, _repeats_heads)


@dataclass(frozen=True)
class RestoreGqa(Pass):
    """Afterwards no attention without a mask reads keys and values that were repeated for its heads."""

    exact = True
    requires = frozenset({"canonical"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        return RULE.apply_everywhere(gm, self.name)
