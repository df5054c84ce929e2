"""fuse_dropout: the dropout before an adapter's A becomes part of the adapted linear's operator.

lora_linear(x, W, b, dropout(x, p), A, B, s)  ->  lora_linear(x, W, b, None, A, B, s, dropout=p)
own_lora_linear(x, …, dropout(x, p), A, B, s)  ->  own_lora_linear(x, …, None, A, B, s, dropout=p)

At each site autograd keeps the mask and what it leaves of x; the operator keeps x, which sites share, and on a CPU a
byte an element (`lorafx/ops/dropout.py`). A dropout whose result has another reader stays. The pass goes after
`fuse_loss`, which looks for a head with its dropout apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from lorafx import ops  # noqa: F401, defines torch.ops.lorafx
from lorafx.graph import Match, Rule, within_vmap
from lorafx.pipeline import Context, Pass


def apart(x, weight, bias, p, lora_A, lora_B, scaling):
    z = torch.ops.aten.dropout.default(x, p, True)
    return torch.ops.lorafx.lora_linear.default(x, weight, bias, z, lora_A, lora_B, scaling)


def fused(x, weight, bias, p, lora_A, lora_B, scaling):
    return torch.ops.lorafx.lora_linear.default(x, weight, bias, None, lora_A, lora_B, scaling, dropout=p)


def own_apart(x, bias, number, features, p, lora_A, lora_B, scaling):
    z = torch.ops.aten.dropout.default(x, p, True)
    return torch.ops.lorafx.own_lora_linear.default(x, bias, number, features, z, lora_A, lora_B, scaling)


def own_fused(x, bias, number, features, p, lora_A, lora_B, scaling):
    own = torch.ops.lorafx.own_lora_linear.default
    return own(x, bias, number, features, None, lora_A, lora_B, scaling, dropout=p)


def _within_vmap(found: Match) -> str | None:
    return "it is within a vmap" if within_vmap(found.anchor) else None


RULES = Rule(apart, fused, _within_vmap), Rule(own_apart, own_fused, _within_vmap)


@dataclass(frozen=True)
class FuseDropout(Pass):
    """Afterwards no adapted linear that is one operator reads the result of a dropout of its own."""

    exact = True
    requires = frozenset({"adapters"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        return sum(rule.apply_everywhere(gm, self.name) for rule in RULES)
