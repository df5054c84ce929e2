"""redraw_dropout: the dropout before an adapter's A is drawn again in backward, by its seed, instead of kept.

lora_linear(x, W, b, dropout(x, p), A, B, s)  ->  lora_linear(x, W, b, None, A, B, s, dropout=p)

Autograd keeps the mask and what it left of x, for each site; the operator then keeps x alone, which sites share. How it
draws is in `lorafx/ops/dropped.py`. A dropout whose result somebody else reads too stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from lorafx import ops  # noqa: F401, defines torch.ops.lorafx
from lorafx.pipeline import Context, Pass
from lorafx.rewrite import ADAPTED_BY, SITE, Match, Provenance, Rule, fake_mode_of, made_by, within_vmap

_operator = torch.ops.lorafx.lora_linear.default


def kept(x, weight, bias, p, lora_A, lora_B, scaling, gemm):
    z = torch.ops.aten.dropout.default(x, p, True)
    return torch.ops.lorafx.lora_linear.default(x, weight, bias, z, lora_A, lora_B, scaling, gemm)


def drawn_again(x, weight, bias, p, lora_A, lora_B, scaling, gemm):
    return torch.ops.lorafx.lora_linear.default(x, weight, bias, None, lora_A, lora_B, scaling, gemm, dropout=p)


RULE = Rule(kept, drawn_again)


@dataclass(frozen=True)
class RedrawDropout(Pass):
    """Afterwards no adapted linear that is one operator reads the result of a dropout of its own."""

    requires = frozenset({"adapters"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        mode, count = fake_mode_of(gm), 0
        for node in gm.graph.find_nodes(op="call_function", target=_operator):
            found = RULE.find(node)
            if not isinstance(found, Match) or within_vmap(node):
                continue
            maker = made_by(node) or Provenance(self.name)
            marks = {key: node.meta[key] for key in (SITE, ADAPTED_BY) if key in node.meta}
            where = Provenance(self.name, maker.site, maker.adapter)
            drawn, _ = RULE.apply(gm, found, where, mode)
            drawn.meta |= marks
            count += 1
        return count
