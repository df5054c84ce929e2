"""Folding: the first layer of each kind becomes a block of the graph, and it and those like it call the block."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from ...errors import CaptureError
from ...graph.effects import ASSERTIONS
from ...graph.modules import CAPTURED
from ...graph.outline import block_of, insert_call, list_layers, replace_region
from ...graph.regions import Region, is_size
from .marks import Mark, layer_like


def fold(gm: GraphModule) -> None:
    """Turn the marks of layers into calls of blocks; a layer that no other is like stays inline."""
    marks = [Mark(node) for node in gm.graph.nodes if node.target is layer_like]
    for first in marks:
        if first.nodes:
            _fold(gm, first, [other for other in marks if other.kind == first.kind and not other.nodes])
    list_layers(gm)
    if marks:
        gm.recompile()


def _fold(gm: GraphModule, first: Mark, likes: list[Mark]) -> None:
    """Fold the layers of one kind: the first, whose nodes are in the graph, and those like it, which are one node."""
    inputs, results, nodes = first.inputs, first.results, first.nodes
    gm.graph.erase_node(first.node)
    if not likes:
        return
    wanted = {results[number] for like in likes for number in like.used().values()}
    region = Region(first.path, _operators(gm, nodes), frozenset(wanted))
    _compute_sizes_outside(gm, region)
    block = block_of(gm, region)
    given, outputs = region.inputs, region.outputs
    replace_region(gm, region, block)
    places = {node: place for place, node in enumerate(inputs)}
    for like in likes:
        theirs = [like.inputs[places[node]] if node in places else _of_all(node) for node in given]
        parts = insert_call(gm, like.node, block, like.path, theirs, None)
        for part, number in like.used().items():
            part.replace_all_uses_with(parts[outputs.index(results[number])])
        for part in [*like.node.users, *parts]:
            if not part.users:
                gm.graph.erase_node(part)
        gm.graph.erase_node(like.node)


def _of_all(node: Node) -> Node:
    """What the first layer reads besides its inputs, if the others read the same: a size, or the graph's constant."""
    if is_size(node) or (node.op == "get_attr" and str(node.target).startswith(f"{CAPTURED}.")):
        return node
    raise CaptureError(f"layers that are alike read {node.target}, which may be one layer's own")


def _operators(gm: GraphModule, nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    """The operators among a layer's nodes, in order, without assertions and sizes of what comes from outside."""
    found, inside = set(nodes), dict[Node, None]()
    for node in list(gm.graph.nodes):
        if node.target in ASSERTIONS and not found.isdisjoint(node.all_input_nodes):
            gm.graph.erase_node(node)
            continue
        elsewhere = is_size(node) and inside.keys().isdisjoint(node.all_input_nodes)
        if node in found and node.op == "call_function" and not elsewhere:
            inside[node] = None
    return tuple(inside)


def _compute_sizes_outside(gm: GraphModule, region: Region) -> None:
    """Compute the sizes that a region computes once more behind it, from its results, for whoever uses them outside."""
    inside: set[Any] = set(region.nodes)
    copies: dict[Node, Node] = {}
    after = region.nodes[-1]
    for node in filter(is_size, region.nodes):
        with gm.graph.inserting_after(after):
            after = copies[node] = gm.graph.node_copy(node, lambda n: copies.get(n, n))
        node.replace_all_uses_with(copies[node], delete_user_cb=lambda user: user not in inside)
    for copy in reversed(copies.values()):
        if not copy.users:
            gm.graph.erase_node(copy)
