"""checkpoint_blocks: a block keeps its inputs for backward and nothing else, and runs again where backward needs more.

call_block(block, layer, x)  ->  checkpoint_block(block, layer, x)       for layers that ask for it, in training

The second run draws the same random numbers as the first, so gradients are the same bits as without.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from lorafx.blocks import asks_for_checkpointing, block_calls, checkpoint_block
from lorafx.pipeline import Context, Pass
from lorafx.rewrite import MADE_BY, Provenance


@dataclass(frozen=True)
class CheckpointBlocks(Pass):
    """Afterwards layers that train and ask for it (or `every` layer that trains) recompute what backward needs.

    A layer asks by its attribute `gradient_checkpointing`, as `model.gradient_checkpointing_enable()` sets it. A block
    that writes into what it is given cannot run twice and is left.
    """

    every: bool = False

    requires = frozenset({"blocks"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        count = 0
        for node, block, path in block_calls(gm):
            layer = gm.get_submodule(path)
            asked = layer.training and (self.every or asks_for_checkpointing(layer))
            if asked and node.target is not checkpoint_block and not _writes_to_inputs(block):
                node.target = checkpoint_block
                node.meta[MADE_BY] = Provenance(self.name)
                count += 1
        return count


def _writes_to_inputs(block: GraphModule) -> bool:
    return any(_is_given(node) for node in block.graph.nodes if _is_mutable(node))


def _is_mutable(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema and schema.is_mutable)


def _is_given(node: Node) -> bool:
    """Whether what a node writes to may be an input, or share memory with one."""
    target = node.args[0]
    while isinstance(target, Node) and target.op == "call_function":
        if target.target is torch.ops.aten.lift_fresh_copy.default:
            return False
        target = target.args[0] if target.args else None
    return True
