"""choose_kernels: linear layers and attention for which this machine has a faster way than ATen's become lorafx's.

linear(x, W, b)                               ->  lorafx.linear(x, W, b)
scaled_dot_product_attention(Q, K, V, …)      ->  lorafx.attention(Q, K, V, …)

On a CPU `lorafx/ops/cpu` says which it has a faster way for, in training. In inference these operators run as ATen's,
and compilers see ATen's. Graphs of other machines and devices stay as they are. It goes after the passes that look for
ATen's operators.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lorafx.graph import within_vmap
from lorafx.ops.cpu import has_attention_for, has_linear_for
from lorafx.pipeline import Context, Pass

aten = torch.ops.aten


OPERATORS = {  # of ATen: lorafx's, and whether there is a faster way for a first argument
    aten.linear.default: (torch.ops.lorafx.linear.default, has_linear_for),
    aten.scaled_dot_product_attention.default: (torch.ops.lorafx.attention.default, has_attention_for),
}


@dataclass(frozen=True)
class ChooseKernels(Pass):
    """Afterwards no linear operator nor attention is ATen's for which lorafx may have a faster way here."""

    exact = True

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        count = 0
        for target, (operator, has) in OPERATORS.items():
            for node in gm.graph.find_nodes(op="call_function", target=target):
                if _is_faster(node, has):
                    node.target, count = operator, count + 1
        return count


def _is_faster(node: Node, has: Callable[[Tensor], bool]) -> bool:
    x = node.args[0].meta["val"]  # type: ignore[union-attr]
    return isinstance(x, Tensor) and not within_vmap(node) and has(x)
