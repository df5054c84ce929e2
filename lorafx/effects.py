"""Effects: which nodes do more than compute their result, so that they may not be dropped, or run twice."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch.fx import GraphModule, Node

from .rewrite import Match, resolve

aten = torch.ops.aten
# They update running statistics, which their schemas do not say.
_NORMS = ("batch_norm", "instance_norm")
# They may return what they are given, which their schemas do not say.
_MAY_PASS_ON = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
# They pin dtypes, and with them an autocast state.
ASSERTIONS = (aten._assert_tensor_metadata.default,)


def must_stay(node: Node, gm: torch.nn.Module) -> bool:
    """Whether a node that nobody uses has to run: inputs, guards, writers, random numbers, the brackets of a vmap."""
    if node.op in ("placeholder", "output", "call_module"):
        return True
    if getattr(node.target, "__module__", "") == "torch._functorch.predispatch":
        return True
    tags = getattr(node.target, "tags", ())
    return writes(node, gm) or torch.Tag.nondeterministic_seeded in tags


def drop_dead(gm: GraphModule) -> None:
    """Erase what computes nothing that is used."""
    gm.graph.eliminate_dead_code(is_impure_node=lambda node: must_stay(node, gm))


def writes(node: Node, gm: torch.nn.Module) -> bool:
    """Whether a node writes into a tensor, itself or in the graphs that it runs."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return any(_body_writes(argument, gm) for argument in node.args if isinstance(argument, Node))
    schema = getattr(node.target, "_schema", None)
    return bool(schema and (schema.is_mutable or any(norm in schema.name for norm in _NORMS)))


def _body_writes(argument: Node, gm: torch.nn.Module) -> bool:
    """Whether an argument is a graph that writes; one that cannot be looked into may."""
    if argument.op == "get_attr":
        body = resolve(gm, str(argument.target))
        return isinstance(body, GraphModule) and any(writes(node, body) for node in body.graph.nodes)
    return argument.op == "placeholder" and not isinstance(argument.meta.get("val"), (torch.Tensor, torch.SymInt, int))


def interrupted(found: Match) -> bool:
    """Whether something is written to between a match's first node and its last, in whose place all inputs are read."""
    node, gm = min(found.nodes), found.anchor.graph.owning_module
    assert gm is not None, "a graph that is rewritten belongs to a module"
    while node is not found.anchor:
        if node not in found.nodes and writes(node, gm):
            return True
        node = node.next
    return False


def writes_to_what_it_is_given(gm: GraphModule) -> bool:
    """Whether a graph writes into its inputs, or into tensors that it reads from its module."""
    inside = set(gm.graph.nodes)
    return any(reaches_out(node, inside) for node in gm.graph.nodes if writes(node, gm))


def reaches_out(node: Node, inside: Container[Node]) -> bool:
    """Whether what a node writes to may be, or share memory with, something that was there before those `inside`."""
    schema = getattr(node.target, "_schema", None)
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
    schema = getattr(node.target, "_schema", None)
    if schema is None or node.target in _MAY_PASS_ON:
        return True
    return any(result.alias_info is not None for result in schema.returns)
