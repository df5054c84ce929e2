"""outline_blocks: sibling modules that compute the same share one graph, and the outer graph has a node for each.

layers.0, layers.1, … inline  ->  call_block(block, layers.0, x), call_block(block, layers.1, …), …

Which modules repeat is found by the modules that nodes come from and by what the nodes compute, not by names of
architectures. Layers that differ, or whose adapters differ, run different blocks. The inverse is `inline_blocks`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from torch.fx import Graph, GraphModule

from lorafx.graph import Provenance
from lorafx.graph.blocks import LAYERS, blocks_of
from lorafx.graph.outline import add_outputs, block_of, list_layers, replace_region, signature_of
from lorafx.graph.regions import Region, is_size, repeated_calls
from lorafx.pipeline import Context, Pass

Kind = tuple[Hashable, Hashable]  # what a layer computes, and the form of its adapters


@dataclass(frozen=True)
class OutlineBlocks(Pass):
    """Afterwards no call of a repeated module is inline, and every pass that follows sees each kind of layer once.

    Of modules within one another the outermost that repeat count.
    """

    exact = True
    requires = frozenset({"canonical"})
    establishes = frozenset({"blocks"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        if LAYERS in gm.meta:
            return 0  # a block runs on a layer, which has no blocks: layers within layers stay inline
        _hoist_sizes(gm.graph)
        blocks: dict[Kind, GraphModule] = dict(_known(gm, context))
        order = {node: number for number, node in enumerate(gm.graph.nodes)}
        found = [region for siblings in repeated_calls(gm, {kind for kind, _ in blocks}) for region in siblings]
        kinds: dict[Kind, list[Region]] = {}
        for region in sorted(found, key=lambda region: order[region.nodes[0]]):
            layer = context.relative_to(region.path)
            if layer is not None:
                key = region.signature(), layer.signature(gm.get_submodule(region.path))
                kinds.setdefault(key, []).append(region)
        for key, regions in kinds.items():
            wanted = {number for region in regions for number in _numbers_of_outputs(region)}
            if key not in blocks:
                blocks[key] = block_of(gm, regions[0])
            add_outputs(gm, blocks[key], sorted(wanted))
        calls = [(region, blocks[key]) for key, regions in kinds.items() for region in regions]
        for region, block in sorted(calls, key=lambda call: -order[call[0].nodes[0]]):  # last first: inputs still exist
            replace_region(gm, region, block, Provenance(self.name))
        list_layers(gm)
        return len(calls)


def _known(gm: GraphModule, context: Context) -> Iterator[tuple[Kind, GraphModule]]:
    """The blocks that the graph has already, by what they compute."""
    for block in blocks_of(gm):
        path = block.meta[LAYERS][0]
        layer, kind = context.relative_to(path), signature_of(block)
        if layer is not None and kind is not None:
            yield (kind, layer.signature(gm.get_submodule(path))), block


def _numbers_of_outputs(region: Region) -> Iterator[int]:
    outputs = set(region.outputs)
    return (number for number, node in enumerate(region.nodes) if node in outputs)


def _hoist_sizes(graph: Graph) -> None:
    """Compute sizes of inputs before anything else but the guards (a module call), so that each layer is given them."""
    known = set(graph.find_nodes(op="placeholder"))
    first = [node for node in graph.nodes if node.op in ("placeholder", "call_module")]
    for node in list(graph.nodes):
        if is_size(node) and node.all_input_nodes and known.issuperset(node.all_input_nodes):
            first[-1].append(node)
            first.append(node)
            known.add(node)
