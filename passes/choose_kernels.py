"""choose_kernels: what this machine has a faster way for than ATen is an operator of lorafx that takes it in training.

linear(x, W, b)                               ->  lorafx.linear(x, W, b)
scaled_dot_product_attention(Q, K, V, …)      ->  lorafx.attention(Q, K, V, …)

On a CPU, for what no other operator of lorafx has taken in: linear operators in half precision that the machine has no
instructions for (`ops/cpu/wide.py`), those in float32 where MKL does not use what it has (`ops/cpu/products.py`),
and attention in half precision (`lorafx/ops/attention.py`). In inference they run as ATen's, and compilers see ATen's.
Graphs of other machines and devices stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lorafx.graph import within_vmap
from lorafx.ops.cpu import products
from lorafx.ops.cpu.wide import is_half, is_slow
from lorafx.pipeline.pipeline import Context, Pass

aten = torch.ops.aten


def _linear_has(x: Tensor) -> bool:
    return is_slow(x) or (x.is_cpu and x.dtype == torch.float32 and products.mkl_leaves_avx512())


def _attention_has(query: Tensor) -> bool:
    return query.is_cpu and is_half(query)


OPERATORS = {
    aten.linear.default: (torch.ops.lorafx.linear.default, _linear_has),
    aten.scaled_dot_product_attention.default: (torch.ops.lorafx.attention.default, _attention_has),
}


@dataclass(frozen=True)
class ChooseKernels(Pass):
    """Afterwards no linear operator nor attention is ATen's for which lorafx may have a faster way here."""

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
