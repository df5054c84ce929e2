"""Effects: which nodes do more than compute their result, so that they must not be dropped or run twice."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from ..torch_private.graphs import is_vmap_bracket, schema_of
from . import resolve, writes
from .blocks import is_block_call

aten = torch.ops.aten
# Their schemas do not say that the result may be the input itself.
_MAY_PASS_ON = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
# They assert dtypes, which makes a graph fail under another autocast state than that of its capture.
ASSERTIONS = (aten._assert_tensor_metadata.default,)


def must_stay(node: Node, gm: torch.nn.Module) -> bool:
    """Whether a node has to stay even if nothing uses it: inputs, guards, writes, random numbers, a vmap's brackets."""
    if node.op in ("placeholder", "output", "call_module"):
        return True
    if is_vmap_bracket(node.target):
        return True
    tags = getattr(node.target, "tags", ())
    return writes(node, gm) or torch.Tag.nondeterministic_seeded in tags


def drop_dead(gm: GraphModule) -> None:
    """Erase the nodes that nothing uses, except those that must stay."""
    gm.graph.eliminate_dead_code(is_impure_node=lambda node: must_stay(node, gm))


def writes_to_what_it_is_given(gm: GraphModule) -> bool:
    """Whether a graph writes into its inputs, or into tensors that it reads from its module."""
    inside = set(gm.graph.nodes)
    return any(reaches_out(node, inside) for node in gm.graph.nodes if writes(node, gm))


def reaches_out(node: Node, inside: Container[Node]) -> bool:
    """Whether a node that writes may write to memory that was there before the nodes `inside` ran."""
    schema = schema_of(node.target)
    if schema is None or not schema.is_mutable:
        return True  # a write that no schema tells of (batch norm's statistics, an inner graph's) is to a buffer
    target = node.args[0]
    while isinstance(target, Node) and target.op == "call_function" and target in inside:
        if target.target is aten.lift_fresh_copy.default or not may_share(target):
            return False
        target = target.args[0] if target.args else None
    return True


def may_share(node: Node) -> bool:
    """Whether a node's result may be its first argument, or a view of it."""
    schema = schema_of(node.target)
    if schema is None or node.target in _MAY_PASS_ON:
        return True
    return any(result.alias_info is not None for result in schema.returns)


def written_inputs(gm: GraphModule) -> set[int]:
    """The numbers of a graph's inputs that it may write to, itself or in its blocks."""
    inputs = {node: number for number, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    sources = (source_of(value) for node in gm.graph.nodes for value in written(node, gm))
    return {inputs[source] for source in sources if source in inputs}


def written(node: Node, gm: torch.nn.Module) -> list[Node]:
    """The values that a node may write to; of an operator that runs graphs which write, all that it is given."""
    given: list[Any]
    if is_block_call(node):
        block = resolve(gm, str(node.args[0].target))  # type: ignore[union-attr]
        given = [node.args[2 + number] for number in written_inputs(block)]
    elif not writes(node, gm):
        return []
    else:
        given = list(node.args)
        schema = schema_of(node.target)
        if schema is not None:
            values = {a.name: v for a, v in zip(schema.arguments, node.args)} | node.kwargs
            given = [values.get(a.name) for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Node)]


def source_of(node: Node, given: Container[Node] = ()) -> Node:
    """The node whose memory a node's result may be: the operator that made it, a read, an input, or one of `given`."""
    while node not in given and node.op == "call_function" and node.args and may_share(node):
        if not isinstance(node.args[0], Node):
            break
        node = node.args[0]
    return node
