"""checkpoint_blocks: a block keeps its inputs for backward and nothing else, and runs again where backward needs more.

call_block(block, layer, x)  ->  checkpoint_block(block, layer, x)       for layers that ask for it, in training

The second run draws the same random numbers as the first, so gradients are the same bits as without.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule

from lorafx.blocks import asks_for_checkpointing, block_calls, checkpoint_block
from lorafx.effects import writes_to_what_it_is_given
from lorafx.pipeline import Context, Pass
from lorafx.rewrite import MADE_BY, Provenance


@dataclass(frozen=True)
class CheckpointBlocks(Pass):
    """Afterwards layers that train and ask for it (or `every` layer that trains) recompute what backward needs.

    A layer asks by its attribute `gradient_checkpointing`, as `model.gradient_checkpointing_enable()` sets it. A block
    that writes into its inputs or buffers cannot run twice and is left.
    """

    every: bool = False

    requires = frozenset({"blocks"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        count = 0
        for node, block, path in block_calls(gm):
            layer = gm.get_submodule(path)
            asked = layer.training and (self.every or asks_for_checkpointing(layer))
            if asked and node.target is not checkpoint_block and not writes_to_what_it_is_given(block):
                node.target = checkpoint_block
                node.meta[MADE_BY] = Provenance(self.name)
                count += 1
        return count
