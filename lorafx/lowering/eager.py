"""Eager: a graph that runs without a compiler calls operators by the shortest way, and reads all tensors at once.

A call of `torch.ops.lorafx.…` goes through torch's dispatcher and back, which on a CPU takes as long as a small product
does. One of `torch.ops.aten.…` is matched with its schema in Python's binding, where `torch.add` reads its arguments in
C. And `self.model.layers.0.self_attn.q_proj.weight` asks seven modules in turn, by a `__getattr__` that looks into
three dicts each. So what runs eagerly is a copy of the graph without these; compilers, and people who read the graph,
get it as it is.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from .. import ops
from ..graph import resolve
from ..graph.blocks import blocks_of, is_block_call
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
        read_together(each)
        each.recompile()
    return other


def read_together(gm: GraphModule) -> None:
    """Put one call of a `reader` in the place of all reads of layers, and of tensors below the root's children.

    What else is read, as the block that all layers run, is read once.
    """
    layers = {call.args[1] for call in gm.graph.nodes if is_block_call(call)}
    first: dict[str, Node] = {}
    tensors, modules = [], []
    for node in gm.graph.find_nodes(op="get_attr"):
        path = str(node.target)
        if node in layers:
            modules.append(node)
        elif "." in path and isinstance(resolve(gm, path), Tensor):
            tensors.append(node)
        elif first.setdefault(path, node) is not node:
            node.replace_all_uses_with(first[path])
            gm.graph.erase_node(node)
    if tensors or modules:
        _call_reader(gm.graph, tensors, modules)


def _call_reader(graph: Graph, tensors: list[Node], modules: list[Node]) -> None:
    children = list(dict.fromkeys(str(node.target).partition(".")[0] for node in (*tensors, *modules)))
    paths = [list(dict.fromkeys(str(node.target) for node in nodes)) for nodes in (tensors, modules)]
    places = enumerate(itertools.chain(*paths))
    start = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(start):
        roots = tuple(map(graph.get_attr, children))
        together = graph.call_function(reader(children, *paths), roots)
        values = {path: graph.call_function(operator.getitem, (together, at)) for at, path in places}
    for node in (*tensors, *modules):
        node.replace_all_uses_with(values[str(node.target)])
        graph.erase_node(node)


def reader(roots: list[str], tensors: list[str], modules: Sequence[str] = ()) -> Callable[..., list[Any]]:
    """A function of the modules named by `roots`: it gives tensors, then modules, that are at these paths then."""
    places = {name: place for place, name in enumerate(roots)}
    further: list[tuple[int, str]] = []  # of each further module: where its parent is, and its name there

    def place_of(path: str) -> int:
        if path not in places:
            parent, _, name = path.rpartition(".")
            further.append((place_of(parent), name))
            places[path] = len(places)
        return places[path]

    owners = [path.rpartition(".") for path in tensors]
    owned = [(place_of(owner), name) for owner, _, name in owners]
    wanted = [place_of(path) for path in modules]

    def read(*given: nn.Module) -> list[Any]:
        found: list[Any] = list(given)
        for parent, name in further:
            child = found[parent]._modules.get(name)
            found.append(getattr(found[parent], name) if child is None else child)  # a wrapper gives what is within it
        values = []
        for owner, name in owned:
            value = found[owner]._parameters.get(name)
            values.append(getattr(found[owner], name) if value is None else value)
        return values + [found[place] for place in wanted]

    return read
