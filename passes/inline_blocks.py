"""inline_blocks: the inverse of outline_blocks. A call of a block becomes the block's operators on the layer's tensors.

call_block(block, layers.3, x)  ->  the nodes of the block, reading `layers.3.…`
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule

from lorafx.graph import Provenance
from lorafx.graph.blocks import block_calls
from lorafx.graph.outline import inline_call, list_layers
from lorafx.pipeline import Context, Pass


@dataclass(frozen=True)
class InlineBlocks(Pass):
    """Afterwards the graph has no blocks."""

    exact = True
    requires = frozenset({"canonical"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        calls = list(block_calls(gm))
        for node, block, layer in calls:
            inline_call(gm, node, block, layer, Provenance(self.name))
        list_layers(gm)
        return len(calls)
