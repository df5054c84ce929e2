"""onednn_products: a pass for Inductor, by which products in float32 on a CPU are those of `ops/cpu`.

mm(X, Y)                 ->  lorafx.product(X, Y)
β · addend + α · X Y     ->  β · addend + α · lorafx.product(X, Y)      Inductor fuses the sum with what reads it

`lorafx.product` is `matmul` of `ops/cpu/products.py` as an operator that compilers do not look into. It is written
only where oneDNN is faster than MKL, of which Inductor knows nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from ...ops.cpu import choices, product_pays
from ...torch_private.inductor import CustomGraphPass, get_hash_for_files

aten = torch.ops.aten


class ProductsByOnednn(CustomGraphPass):
    """Runs after Inductor's own passes on ATen operators."""

    def __call__(self, graph: Graph) -> None:
        for target in (aten.mm.default, aten.addmm.default):
            for node in graph.find_nodes(op="call_function", target=target):
                if _pays(*node.args[-2:]):
                    _write(graph, node)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,)), choices()


def _pays(left: Node, right: Node) -> bool:
    """Whether oneDNN is faster, for the sizes that Inductor compiles with in mind."""
    x, y = left.meta["val"], right.meta["val"]
    return product_pays(x, _hint(x.numel() * y.shape[1]))


def _hint(size: int | torch.SymInt) -> int:
    """The size in a call that is being compiled for; 0 for a size that depends on data."""
    return (size.node.hint or 0) if isinstance(size, torch.SymInt) else size


def _write(graph: Graph, node: Node) -> None:
    *addend, left, right = node.args
    with graph.inserting_before(node):
        total = _called(graph, torch.ops.lorafx.product.default, (left, right), node)
        alpha, beta = (node.kwargs.get(name, 1) for name in ("alpha", "beta"))
        if alpha != 1:
            total = _called(graph, aten.mul.Tensor, (total, alpha), node)
        if addend and beta != 0:  # for beta = 0 torch does not read the addend, which may be nan
            scaled = addend[0] if beta == 1 else _called(graph, aten.mul.Tensor, (addend[0], beta), addend[0])
            total = _called(graph, aten.add.Tensor, (total, scaled), node)
    node.replace_all_uses_with(total)
    graph.erase_node(node)


def _called(graph: Graph, target: Any, args: tuple[Any, ...], like: Any) -> Node:
    """A new node whose value has the shape and dtype of another's."""
    node = graph.call_function(target, args)
    node.meta = dict(like.meta)
    return node
