"""canonicalize: the captured graph in the one form that later passes expect.

Assertions about tensor metadata go, because they would make the graph fail under another autocast state, and so do
nodes that nothing uses. `detach_` of a constant goes: it counts as a write, and writes nothing. A cast names its dtype,
even if it was asked for by another tensor's. And every parameter is read right before its first use instead of at the
top of the graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule

from lorafx.graph import Rule
from lorafx.graph.effects import ASSERTIONS, drop_dead
from lorafx.pipeline import Context, Pass

aten = torch.ops.aten


def detached(constant):
    return aten.detach_.default(aten.lift_fresh_copy.default(constant))


def lifted(constant):
    return aten.lift_fresh_copy.default(constant)


CONSTANT = Rule(detached, lifted)


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Afterwards no node is dead, and every attribute is read next to its first user."""

    exact = True
    establishes = frozenset({"canonical"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        before = len(gm.graph.nodes)
        for node in list(gm.graph.nodes):
            if node.target in ASSERTIONS:
                gm.graph.erase_node(node)
        CONSTANT.apply_everywhere(gm, self.name)
        _name_dtypes(gm.graph)
        drop_dead(gm)
        _sink_attributes(gm.graph)
        return before - len(gm.graph.nodes)


def _name_dtypes(graph: Graph) -> None:
    """Have casts that move nothing be `to.dtype`."""
    casts = (aten.type_as.default, aten.to.device)
    for node in [node for target in casts for node in graph.find_nodes(op="call_function", target=target)]:
        before, after = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
        if len(node.args) <= 3 and not node.kwargs and before.device == after.device:
            node.target, node.args = aten.to.dtype, (node.args[0], after.dtype)


def _sink_attributes(graph: Graph) -> None:
    position = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.find_nodes(op="get_attr"):
        min(node.users, key=position.__getitem__).prepend(node)
