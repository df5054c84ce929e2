"""Blocks: a region of the model that repeats is one graph, which every layer runs on its own parameters.

The outer graph has a node for each layer, `call_block(block, layer, *inputs)`. A block is a GraphModule whose
attributes are relative to the layer (`self.self_attn.q_proj.weight`); the layer is the tree's own module, so a block
reads whatever the layer has at that moment, and one code object serves all layers of a kind.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import checkpoint

from ..errors import RecomputeError
from ..ops.modes import is_recorded
from ..ops.offload import offloaded
from ..torch_private.tensors import version_of

LAYERS = "layers"  # in a block's meta: the paths of the modules that run it, in order


def layers_of(gm: GraphModule) -> list[str]:
    """The paths of the modules that run a graph, in order: the layers of a block, or "", the root, of a whole call."""
    return list(gm.meta.get(LAYERS, [""]))


def call_block(block: GraphModule | Callable[..., Any], layer: nn.Module, *inputs: Any) -> tuple[Any, ...]:
    """Run a block on a layer's parameters; `block` is its graph, or the function that the graph was lowered to."""
    if isinstance(block, GraphModule):
        return type(block).forward(layer, *inputs)  # type: ignore[arg-type]
    return block(layer, *inputs)


def checkpoint_block(block: Any, layer: nn.Module, *inputs: Any) -> tuple[Any, ...]:
    """Run a block and keep only its inputs for backward, which runs it again (Chen et al., 2016, arXiv 1604.06174)."""
    # While a CUDA graph is recorded the state of random numbers cannot be read: layers that draw some are not recorded.
    preserve = not is_recorded()
    run = partial(_call_unchanged, block, layer, _versions(layer))
    return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=preserve)


def offload_block(block: Any, layer: nn.Module, *inputs: Any, moves: tuple[int, ...]) -> tuple[Any, ...]:
    """`checkpoint_block` that keeps the inputs numbered `moves` in the host's memory, if they are on another device."""
    return offloaded(partial(_call_unchanged, block, layer, _versions(layer)), moves, *inputs)


def _call_unchanged(block: Any, layer: nn.Module, versions: list[int], *inputs: Any) -> tuple[Any, ...]:
    """Run a block; `RecomputeError` if the layer's tensors were written to since `versions` was taken.

    The second run, in backward, would then compute something else than the first.
    """
    if _versions(layer) != versions:
        raise RecomputeError(
            "a checkpointed layer is to run again for backward, and its parameters or buffers were written to after it "
            "ran; call backward before changing them, or train without gradient checkpointing"
        )
    return call_block(block, layer, *inputs)


def _versions(layer: nn.Module) -> list[int]:
    tensors = (
        t for module in layer.modules() for owned in (module._parameters, module._buffers) for t in owned.values()
    )
    return [version_of(tensor) for tensor in tensors if tensor is not None and not tensor.is_inference()]


def repeated_modules(root: nn.Module) -> list[nn.Module]:
    """A model's layers: the outermost siblings with numbers for names, at least two of one class, in order."""
    numbered = {name: child for name, child in root._modules.items() if name.isdigit() and child is not None}
    classes = [type(child) for child in numbered.values()]
    if len(set(classes)) < len(classes):
        return list(numbered.values())
    return [layer for child in root._modules.values() if child is not None for layer in repeated_modules(child)]


def asks_for_checkpointing(layer: nn.Module) -> bool:
    """Whether a layer's own flag says so, as `gradient_checkpointing_enable()` sets it on transformers' layers."""
    return bool(getattr(layer, "gradient_checkpointing", False))


RUN = (call_block, checkpoint_block, offload_block)


def is_block_call(node: Node) -> bool:
    """Whether a node runs a block."""
    return node.op == "call_function" and node.target in RUN


def is_of_block(node: Node) -> bool:
    """Whether a node runs a block or takes one of its outputs."""
    source = node.args[0] if node.target is operator.getitem else node
    return isinstance(source, Node) and is_block_call(source)


def block_calls(gm: GraphModule) -> Iterator[tuple[Node, GraphModule, str]]:
    """The nodes of a graph that run a block: each with the block and the path of the layer."""
    for node in gm.graph.nodes:
        if is_block_call(node):
            block, layer = node.args[:2]
            yield node, gm.get_submodule(str(block.target)), str(layer.target)  # type: ignore[union-attr, misc]


def blocks_of(gm: GraphModule) -> list[GraphModule]:
    """The blocks that a graph runs, each once."""
    return list({id(block): block for _, block, _ in block_calls(gm)}.values())
