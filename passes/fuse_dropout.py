"""fuse_dropout: the dropout before an adapter's A becomes part of the adapted linear's operator.

lora_linear(x, W, b, dropout(x, p), A, B, s)  ->  lora_linear(x, W, b, None, A, B, s, dropout=p)

Autograd keeps a mask and what it left of x, at each site; the operator keeps x, which sites share, and on a CPU a byte
an element (`lorafx/ops/dropped.py`). A dropout whose result somebody else reads too stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from lorafx import ops  # noqa: F401, defines torch.ops.lorafx
from lorafx.pipeline import Context, Pass
from lorafx.rewrite import ADAPTED_BY, SITE, Match, Provenance, Rule, fake_mode_of, made_by, within_vmap


def apart(x, weight, bias, p, lora_A, lora_B, scaling, gemm):
    z = torch.ops.aten.dropout.default(x, p, True)
    return torch.ops.lorafx.lora_linear.default(x, weight, bias, z, lora_A, lora_B, scaling, gemm)


def fused(x, weight, bias, p, lora_A, lora_B, scaling, gemm):
    return torch.ops.lorafx.lora_linear.default(x, weight, bias, None, lora_A, lora_B, scaling, gemm, dropout=p)


RULE = Rule(apart, fused)


@dataclass(frozen=True)
class FuseDropout(Pass):
    """Afterwards no adapted linear that is one operator reads the result of a dropout of its own."""

    requires = frozenset({"adapters"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        mode, count = fake_mode_of(gm), 0
        for node in gm.graph.find_nodes(op="call_function", target=torch.ops.lorafx.lora_linear.default):
            found = RULE.find(node)
            if not isinstance(found, Match) or within_vmap(node):
                continue
            maker = made_by(node) or Provenance(self.name)
            marks = {key: node.meta[key] for key in (SITE, ADAPTED_BY) if key in node.meta}
            fused_node, _ = RULE.apply(gm, found, Provenance(self.name, maker.site, maker.adapter), mode)
            fused_node.meta |= marks
            count += 1
        return count
