"""by_onednn: a pass for Inductor, by which products in float32 on a CPU are those of `ops/products.py`.

mm(X, Y)                 ->  lorafx.product(X, Y)
β · addend + α · X Y     ->  β · addend + α · lorafx.product(X, Y)      which Inductor adds up where it is read

`lorafx.product` is what `ops/products.py` makes of it, an operator that compilers do not look into. Only where
oneDNN is faster than MKL, of which Inductor knows nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from ..ops.cpu import products
from ..torch_private.compilers import CustomGraphPass, get_hash_for_files

aten = torch.ops.aten


class ProductsByOnednn(CustomGraphPass):
    """Runs after Inductor's own passes on ATen operators."""

    def __call__(self, graph: Graph) -> None:
        if not products.mkl_leaves_avx512():
            return
        for target in (aten.mm.default, aten.addmm.default):
            for node in graph.find_nodes(op="call_function", target=target):
                if _pays(*node.args[-2:]):
                    _write(graph, node)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__, products.__file__)), products.mkl_leaves_avx512()


def _pays(left: Node, right: Node) -> bool:
    """As `products.onednn_pays`, for the sizes that Inductor compiles with in mind."""
    x, y = left.meta["val"], right.meta["val"]
    return x.dtype == torch.float32 and x.is_cpu and _hint(x.numel() * y.shape[1]) >= products.LEAST


def _hint(size: int | torch.SymInt) -> int:
    """Of a size that depends on data there is none."""
    return (size.node.hint or 0) if isinstance(size, torch.SymInt) else size


def _write(graph: Graph, node: Node) -> None:
    *addend, left, right = node.args
    with graph.inserting_before(node):
        total = _called(graph, torch.ops.lorafx.product.default, (left, right), node)
        alpha, beta = (node.kwargs.get(name, 1) for name in ("alpha", "beta"))
        if alpha != 1:
            total = _called(graph, aten.mul.Tensor, (total, alpha), node)
        if addend and beta != 0:  # or nothing of the addend is read
            scaled = addend[0] if beta == 1 else _called(graph, aten.mul.Tensor, (addend[0], beta), addend[0])
            total = _called(graph, aten.add.Tensor, (total, scaled), node)
    node.replace_all_uses_with(total)
    graph.erase_node(node)


def _called(graph: Graph, target: Any, args: tuple[Any, ...], like: Any) -> Node:
    """A new node whose value is like that of another."""
    node = graph.call_function(target, args)
    node.meta = dict(like.meta)
    return node
