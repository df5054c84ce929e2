"""outline_blocks: sibling modules that compute the same are one graph, and the outer graph has a node for each.

layers.0, layers.1, … inline  ->  call_block(block, layers.0, x), call_block(block, layers.1, …), …

Which modules repeat is found by where nodes come from and by what they compute, not by names of architectures. Layers
that differ, or whose adapters differ, run different blocks. The inverse is `inline_blocks`.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable
from dataclasses import dataclass

from torch import nn
from torch.fx import Graph, GraphModule, Node

from lorafx.blocks import LAYERS, call_block
from lorafx.pipeline import Context, Pass
from lorafx.regions import Region, families, is_size
from lorafx.rewrite import INHERITED, MADE_BY, Provenance
from lorafx.rooted import CAPTURED, over


@dataclass(frozen=True)
class OutlineBlocks(Pass):
    """Afterwards no call of a repeated module is inline, and every pass that follows sees each kind of layer once."""

    requires = frozenset({"canonical"})
    establishes = frozenset({"blocks"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        _hoist_sizes(gm.graph)
        kinds: dict[Hashable, GraphModule] = {}
        calls: list[tuple[Region, GraphModule]] = []
        order = {node: number for number, node in enumerate(gm.graph.nodes)}
        found = [region for family in families(gm) for region in family]
        for region in sorted(found, key=lambda region: order[region.nodes[0]]):
            layer = context.below(region.path)
            if layer is None:
                continue
            key = region.signature(), layer.signature(gm.get_submodule(region.path))
            if key not in kinds:
                kinds[key] = _outlined(gm, region, f"block_{len(kinds)}")
            kinds[key].meta[LAYERS].append(region.path)
            calls.append((region, kinds[key]))
        for region, block in reversed(calls):  # so that what a region uses is there as long as it is
            _call(gm, region, block, self.name)
        return len(calls)


def _hoist_sizes(graph: Graph) -> None:
    """Compute sizes of inputs before anything else, so that each layer is given them."""
    known = set(graph.find_nodes(op="placeholder"))
    last = [node for node in graph.nodes if node.op == "placeholder" or node.op == "call_module"][-1:]
    for node in list(graph.nodes):
        if last and is_size(node) and node.all_input_nodes and known.issuperset(node.all_input_nodes):
            last[0].append(node)
            last = [node]
            known.add(node)


def _outlined(gm: GraphModule, region: Region, name: str) -> GraphModule:
    """The graph of a region by itself, over its own module, below the outer graph's `captured`."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in region.inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta["val"] = node.meta.get("val")
    for node in region.nodes:
        for read in node.all_input_nodes:
            if read in region.own and read not in copies:
                copies[read] = graph.get_attr(region.own[read])
                copies[read].meta = dict(read.meta)
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta["nn_module_stack"] = _relative(node.meta.get("nn_module_stack"), region.path)
    graph.output(tuple(copies[node] for node in region.outputs))
    block = over(graph, gm.get_submodule(region.path), nn.Module())
    block.meta[LAYERS] = []
    gm.get_submodule(CAPTURED).add_module(name, block)
    block.meta["name"] = name
    return block


def _relative(stack: dict[str, tuple[str, type]] | None, path: str) -> dict[str, tuple[str, type]]:
    """Where a node comes from, seen from the module at `path`."""
    within = ((key, *place) for key, place in (stack or {}).items())
    return {
        key: (where.partition("@")[0].removeprefix(path).lstrip("."), cls)
        for key, where, cls in within
        if f"{where.partition('@')[0]}.".startswith(f"{path}.")
    }


def _call(gm: GraphModule, region: Region, block: GraphModule, made_by: str) -> None:
    """Put a call of the block where the region was."""
    graph, last = gm.graph, region.nodes[-1]
    outputs = region.outputs

    def described(node: Node, val: object) -> Node:
        node.meta = {key: last.meta[key] for key in INHERITED if key in last.meta}
        node.meta |= {MADE_BY: Provenance(made_by), "val": val}
        return node

    with graph.inserting_after(last):
        spot = described(graph.get_attr(f"{CAPTURED}.{block.meta['name']}"), block)
    with graph.inserting_after(spot):
        layer = described(graph.get_attr(region.path), gm.get_submodule(region.path))
    with graph.inserting_after(layer):
        call = graph.call_function(call_block, (spot, layer, *region.inputs))
    described(call, tuple(node.meta.get("val") for node in outputs))
    before, inside = call, set(region.nodes)
    for number, node in enumerate(outputs):
        with graph.inserting_after(before):
            before = described(graph.call_function(operator.getitem, (call, number)), node.meta.get("val"))
        node.replace_all_uses_with(before, delete_user_cb=lambda user: user not in inside)
    for node in reversed(region.nodes):
        graph.erase_node(node)
    for read in region.own:
        if not read.users:
            graph.erase_node(read)
