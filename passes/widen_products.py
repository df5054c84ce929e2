"""widen_products: in half precision on a CPU that has no instructions for it, products may go by way of float32.

linear(x, W, b)                               ->  lorafx.linear(x, W, b)
scaled_dot_product_attention(Q, K, V, …)      ->  lorafx.attention(Q, K, V, …)

For what no other operator of lorafx has taken in. The operators widen in training alone, where graphs run eagerly; how,
and what that gains, is in `lorafx/ops/wide.py`. Graphs of other machines and devices stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lorafx import ops  # noqa: F401, defines torch.ops.lorafx
from lorafx.ops.wide import is_slow
from lorafx.pipeline import Context, Pass
from lorafx.rewrite import within_vmap

aten = torch.ops.aten

OPERATORS = {
    aten.linear.default: torch.ops.lorafx.linear.default,
    aten.scaled_dot_product_attention.default: torch.ops.lorafx.attention.default,
}


@dataclass(frozen=True)
class WidenProducts(Pass):
    """Afterwards no linear operator nor attention of numbers that this machine multiplies slowly is ATen's."""

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        nodes = [node for target in OPERATORS for node in gm.graph.find_nodes(op="call_function", target=target)]
        for node in (slow := [node for node in nodes if _is_slow(node)]):
            node.target = OPERATORS[node.target]
        return len(slow)


def _is_slow(node: Node) -> bool:
    x = node.args[0].meta["val"]  # type: ignore[union-attr]
    return isinstance(x, Tensor) and not within_vmap(node) and is_slow(x)
