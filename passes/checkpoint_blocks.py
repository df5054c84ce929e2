"""checkpoint_blocks: a block keeps nothing but its inputs for backward, which runs it again.

call_block(block, layer, x)  ->  checkpoint_block(block, layer, x)       for layers that ask for it, in training
                             ->  offload_block(block, layer, x, moves=(0,))      x waits in the host's memory

The second run draws the same random numbers as the first, so gradients are the same bits as without.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lorafx.graph import MADE_BY, Provenance
from lorafx.graph.blocks import (
    asks_for_checkpointing,
    block_calls,
    call_block,
    checkpoint_block,
    is_block_call,
    offload_block,
)
from lorafx.graph.effects import writes_to_what_it_is_given
from lorafx.pipeline import Context, Pass


@dataclass(frozen=True)
class CheckpointBlocks(Pass):
    """Afterwards layers in training that ask for it (or `every` layer in training) recompute what backward needs.

    A layer asks by its attribute `gradient_checkpointing`, as `model.gradient_checkpointing_enable()` sets it. A block
    that writes into its inputs or buffers cannot run twice and is left. With `offload`, inputs that no other layer is
    given, such as the output of the layer before, wait in the host's memory.
    """

    every: bool = False
    offload: bool = False

    requires = frozenset({"blocks"})

    @property
    def exact(self) -> bool:  # type: ignore[override]
        """Whether the model's own Python does the same: it checkpoints what asks for it, and moves nothing."""
        return not (self.every or (self.offload and torch.cuda.is_available()))

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        count = 0
        for node, block, path in block_calls(gm):
            layer = gm.get_submodule(path)
            asked = layer.training and (self.every or asks_for_checkpointing(layer))
            here = (call_block, checkpoint_block) if self.offload else (call_block,)
            if asked and node.target in here and not writes_to_what_it_is_given(block):
                node.target = offload_block if self.offload else checkpoint_block
                if self.offload:
                    node.kwargs = {"moves": tuple(_own_inputs(node))}
                node.meta[MADE_BY] = Provenance(self.name)
                count += 1
        return count


def _own_inputs(call: Node) -> Iterator[int]:
    """The numbers of the inputs that are activations and that no other layer is given."""
    for number, value in enumerate(call.args[2:]):
        if isinstance(value, Node) and _is_activation(value):
            others = (user for user in value.users if user is not call)
            if not any(map(is_block_call, others)):
                yield number


def _is_activation(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()
