"""Effects: which nodes do more than compute their result, so that they may not be dropped, or run twice."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch.fx import GraphModule, Node

from ..torch_private.graphs import is_vmap_bracket, schema_of
from . import writes

aten = torch.ops.aten
# They may return what they are given, which their schemas do not say.
_MAY_PASS_ON = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
# They pin dtypes, and with them an autocast state.
ASSERTIONS = (aten._assert_tensor_metadata.default,)


def must_stay(node: Node, gm: torch.nn.Module) -> bool:
    """Whether a node that nobody uses has to run: inputs, guards, writers, random numbers, the brackets of a vmap."""
    if node.op in ("placeholder", "output", "call_module"):
        return True
    if is_vmap_bracket(node.target):
        return True
    tags = getattr(node.target, "tags", ())
    return writes(node, gm) or torch.Tag.nondeterministic_seeded in tags


def drop_dead(gm: GraphModule) -> None:
    """Erase what computes nothing that is used."""
    gm.graph.eliminate_dead_code(is_impure_node=lambda node: must_stay(node, gm))


def writes_to_what_it_is_given(gm: GraphModule) -> bool:
    """Whether a graph writes into its inputs, or into tensors that it reads from its module."""
    inside = set(gm.graph.nodes)
    return any(reaches_out(node, inside) for node in gm.graph.nodes if writes(node, gm))


def reaches_out(node: Node, inside: Container[Node]) -> bool:
    """Whether what a node writes to may be, or share memory with, something that was there before those `inside`."""
    schema = schema_of(node.target)
    if schema is None or not schema.is_mutable:
        return True  # hidden writes, and those of inner graphs, are to buffers
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
