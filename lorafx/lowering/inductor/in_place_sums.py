"""in_place_sums: a pass for Inductor that adds a product to another in the other's own memory.

addmm(addend, X, Y)          ->  addmm_(addend, X, Y)           where the addend is a product that nobody else reads
addmm(any, X, Y, beta=0)     ->  addmm_(empty, X, Y, beta=0)    where nothing is added: a product times α

Inductor writes `addmm` to new memory, and torch copies the addend there before it multiplies: a pass over every y and
every dx of an adapted linear for nothing. An addend that is not read is expanded to the product's shape all the same,
which takes longer than a small product. (Inductor itself has a list of operators to run in place. That list belongs to
the process, and adding to it would change what others compile.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from ...torch_private.inductor import CustomGraphPass, get_hash_for_files, inductor, let_inductor_call

aten = torch.ops.aten
_PRODUCTS = aten.mm.default, aten.addmm.default, aten._scaled_mm.default
_VIEWS = aten.view.default, aten.reshape.default, aten._unsafe_view.default


class SumsInPlace(CustomGraphPass):
    """Runs after Inductor's own passes on ATen operators. Where products are tuned, their templates do the adding."""

    def __call__(self, graph: Graph) -> None:
        if inductor.max_autotune or inductor.max_autotune_gemm:
            return
        let_inductor_call(aten.addmm_.default, "torch.Tensor.addmm_")
        for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
            memory = _memory_for(graph, node)
            if memory is not None:
                node.target, node.args = aten.addmm_.default, (memory, *node.args[1:])
                node.replace_all_uses_with(memory)  # Inductor would take what `addmm_` returns for new memory

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def _memory_for(graph: Graph, total: Node) -> Node | None:
    """What a sum may be written to, if anything."""
    addend, *factors = total.args
    if total.kwargs.get("beta", 1) == 0:
        return _new_memory(graph, total)
    return addend if addend not in factors and _is_spent(addend) and _alike(addend, total) else None  # type: ignore


def _new_memory(graph: Graph, total: Node) -> Node | None:
    """Memory for a product of known sizes, as gradients of parameters have them."""
    value = total.meta["val"]
    if any(isinstance(size, torch.SymInt) for size in value.shape):
        return None
    with graph.inserting_before(total):
        memory = graph.call_function(
            aten.empty.memory_format, (list(value.shape),), {"dtype": value.dtype, "device": value.device}
        )
    memory.meta = {"val": value}
    return memory


def _is_spent(addend: Node) -> bool:
    """Whether an addend is a product, or a view of one, that has no other reader."""
    while addend.target in _VIEWS and _is_read_once(addend):
        addend = addend.args[0]  # type: ignore[assignment]
    return addend.target in _PRODUCTS and _is_read_once(addend)


def _is_read_once(node: Node) -> bool:
    """Whether a node has one reader. What `addmm_` added to it before is a part of it, and no reader."""
    return sum(user.target is not aten.addmm_.default for user in node.users) == 1


def _alike(addend: Node, total: Node) -> bool:
    """Whether a sum has its addend's shape at every size. An addend of another shape would have to be expanded."""
    return statically_known_true(sym_eq(addend.meta["val"].shape, total.meta["val"].shape))
