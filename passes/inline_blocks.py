"""inline_blocks: the inverse of outline_blocks. A call of a block becomes the block's operators on the layer's tensors.

call_block(block, layers.3, x)  ->  the nodes of the block, reading `layers.3.…`
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from lorafx.blocks import block_calls
from lorafx.pipeline import Context, Pass
from lorafx.rewrite import MADE_BY, Provenance
from lorafx.rooted import CAPTURED


@dataclass(frozen=True)
class InlineBlocks(Pass):
    """Afterwards the graph is flat."""

    requires = frozenset({"canonical"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        calls = list(block_calls(gm))
        for node, block, layer in calls:
            _inline(gm, node, block, layer, self.name)
        for name in {block.meta["name"] for _, block, _ in calls}:
            del gm.get_submodule(CAPTURED)._modules[name]
        return len(calls)


def _inline(gm: GraphModule, call: Node, block: GraphModule, layer: str, made_by: str) -> None:
    graph, inputs = gm.graph, list(call.args[2:])
    copies: dict[Node, Node] = dict(zip(block.graph.find_nodes(op="placeholder"), inputs))  # type: ignore[arg-type]
    with graph.inserting_before(call):
        for node in block.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.op == "get_attr":
                copies[node].target = f"{layer}.{node.target}"
            copies[node].meta.setdefault(MADE_BY, Provenance(made_by))
            copies[node].meta["nn_module_stack"] = _below(node.meta.get("nn_module_stack"), layer)
    reads = [read for read in call.args[:2] if isinstance(read, Node)]
    results = block.graph.output_node().args[0]
    for part in list(call.users):
        assert part.target is operator.getitem
        part.replace_all_uses_with(copies[results[part.args[1]]])  # type: ignore[index, call-overload]
        graph.erase_node(part)
    graph.erase_node(call)
    for read in reads:
        if not read.users:
            graph.erase_node(read)


def _below(stack: dict[str, tuple[str, type]] | None, layer: str) -> dict[str, tuple[str, type]]:
    """Where a node comes from, seen from the root."""
    return {key: (f"{layer}.{path}".rstrip("."), cls) for key, (path, cls) in (stack or {}).items()}
