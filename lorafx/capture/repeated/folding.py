"""What a graph captured with `once` becomes: the layers that were traced are blocks, and those like them call these."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from ...errors import CaptureError
from ...graph.effects import ASSERTIONS
from ...graph.modules import CAPTURED
from ...graph.outline import block_of, insert_call, list_layers, replace_region
from ...graph.regions import Region, is_size
from .recorder import layer_like


class _Mark:
    """A node that stands for a layer: one that was traced, or one that is like it."""

    def __init__(self, node: Node):
        self.node = node

    path = property(lambda self: self.node.args[0])
    kind = property(lambda self: self.node.args[1])
    inputs = property(lambda self: self.node.args[2])
    results = property(lambda self: self.node.args[3])  # by number, or the numbers of those that are wanted
    nodes = property(lambda self: self.node.args[4] if len(self.node.args) > 4 else ())

    def used(self) -> dict[Node, int]:
        """The nodes that take one of the layer's results, by the result's number, if somebody uses them."""
        return {part: self.results[part.args[1]] for part in self.node.users if part.users}


def fold(gm: GraphModule) -> None:
    """Turn the marks of layers into calls of blocks; a layer that no other is like stays inline."""
    marks = [_Mark(node) for node in gm.graph.nodes if node.target is layer_like]
    for mark in marks:
        if mark.nodes:
            _fold(gm, mark, [other for other in marks if other.kind == mark.kind and not other.nodes])
    list_layers(gm)
    if marks:
        gm.recompile()


def _fold(gm: GraphModule, mark: _Mark, likes: list[_Mark]) -> None:
    inputs, results, nodes = mark.inputs, mark.results, mark.nodes
    gm.graph.erase_node(mark.node)
    if not likes:
        return
    wanted = {results[number] for like in likes for number in like.used().values()}
    region = Region(mark.path, _operators(gm, nodes), frozenset(wanted))
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
    """What a layer reads besides its inputs, if all layers read it: a size, or a constant that the graph owns."""
    if is_size(node) or (node.op == "get_attr" and str(node.target).startswith(f"{CAPTURED}.")):
        return node
    raise CaptureError(f"layers that are alike read {node.target}, which may be one layer's own")


def _operators(gm: GraphModule, nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    """The operators among nodes in order, without assertions, and without sizes that are computed elsewhere."""
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
    """Let what uses a size that the region computes use one that is computed from the region's results."""
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
