"""Eager: a graph that runs without a compiler calls operators by the shortest way, and reads all tensors at once.

A call of `torch.ops.lorafx.…` goes through torch's dispatcher and back, which on a CPU takes as long as a small product
does. One of `torch.ops.aten.…` is matched with its schema in Python's binding, where `torch.add` reads its arguments in
C. And `self.model.layers.0.self_attn.q_proj.weight` asks seven modules in turn, by a `__getattr__` that looks into
three dicts each. So what runs eagerly is a copy of the graph without these; compilers, and people who read the graph,
get it as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from .. import ops
from ..graph import resolve
from ..graph.blocks import blocks_of
from ..graph.modules import by_leaves
from ..torch_private.graphs import C_FUNCTIONS, schema_of

aten = torch.ops.aten
_TORCHS = (  # what decoders are made of, where torch's function of the same name takes the operator's own arguments
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default, aten.rsqrt.default),
    *(aten.cos.default, aten.sin.default, aten.silu.default, aten.gelu.default, aten.softmax.int, aten.where.self),
    *(aten.cat.default, aten.view.default, aten.reshape.default, aten.expand.default, aten.contiguous.default),
    *(aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.select.int),
    *(aten.linear.default, aten.matmul.default, aten.embedding.default, aten.layer_norm.default),
    aten.scaled_dot_product_attention.default,
)


def _function(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """torch's own function for an ATen operator, which is written in C."""
    name = schema_of(op).name.removeprefix("aten::")
    return next(getattr(home, name) for home in (torch, C_FUNCTIONS, Tensor) if hasattr(home, name))


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **{getattr(torch.ops.lorafx, name).default: getattr(ops, name) for name in ops.__all__},
    **{op: _function(op) for op in _TORCHS},
}


def direct(gm: GraphModule) -> GraphModule:
    """A copy over the same tree that is called with a call's leaves and calls functions instead of operators."""
    other = by_leaves(gm)
    for each in (other, *blocks_of(other)):
        for node in each.graph.nodes:
            node.target = _FUNCTIONS.get(node.target, node.target)
        _read_together(each)
        each.recompile()
    return other


def _read_together(gm: GraphModule) -> None:
    """Put one call of a `reader` in the place of all reads of tensors below the root's children."""
    reads = [node for node in gm.graph.find_nodes(op="get_attr") if _is_below_a_child(gm, str(node.target))]
    if not reads:
        return
    children = list(dict.fromkeys(str(node.target).partition(".")[0] for node in reads))
    paths = list(dict.fromkeys(str(node.target) for node in reads))
    first = next(node for node in gm.graph.nodes if node.op != "placeholder")
    with gm.graph.inserting_before(first):
        roots = tuple(map(gm.graph.get_attr, children))
        together = gm.graph.call_function(reader(children, paths), roots)
        tensors = {path: gm.graph.call_function(operator.getitem, (together, at)) for at, path in enumerate(paths)}
    for node in reads:
        node.replace_all_uses_with(tensors[str(node.target)])
        gm.graph.erase_node(node)


def _is_below_a_child(gm: GraphModule, path: str) -> bool:
    return "." in path and isinstance(resolve(gm, path), Tensor)


def reader(roots: list[str], paths: list[str]) -> Callable[..., list[Tensor]]:
    """A function of the modules named by `roots` that gives the tensors at `paths`, as they are when it is called."""
    places = {name: place for place, name in enumerate(roots)}
    modules: list[tuple[int, str]] = []  # of each further module: where its parent is, and its name there

    def place_of(path: str) -> int:
        if path not in places:
            parent, _, name = path.rpartition(".")
            modules.append((place_of(parent), name))
            places[path] = len(places)
        return places[path]

    owners = [path.rpartition(".") for path in paths]
    tensors = [(place_of(owner), name) for owner, _, name in owners]

    def read(*given: nn.Module) -> list[Tensor]:
        found: list[Any] = list(given)
        for parent, name in modules:
            child = found[parent]._modules.get(name)
            found.append(getattr(found[parent], name) if child is None else child)  # a wrapper gives what is within it
        values = []
        for owner, name in tensors:
            value = found[owner]._parameters.get(name)
            values.append(getattr(found[owner], name) if value is None else value)
        return values

    return read
