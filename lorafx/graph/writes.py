"""Which nodes write into tensors: a read of the same tensor must not be moved from one side of them to the other."""

from __future__ import annotations

import functools

import torch
from torch.fx import GraphModule, Node

from ..torch_private.graphs import schema_of
from .blocks import is_block_call
from .match import Match
from .values import resolve

# Their schemas do not say that they update running statistics.
_NORMS = ("batch_norm", "instance_norm")


def writes(node: Node, gm: torch.nn.Module) -> bool:
    """Whether a node writes into a tensor, itself or in the graphs that it runs."""
    if isinstance(node.target, torch._ops.HigherOrderOperator) or is_block_call(node):
        return any(_body_writes(argument, gm) for argument in node.args if isinstance(argument, Node))
    return isinstance(node.target, torch._ops.OpOverload) and _operator_writes(node.target)


@functools.cache  # passes ask of every node, again and again
def _operator_writes(operator: torch._ops.OpOverload) -> bool:
    schema = schema_of(operator)
    return bool(schema and (schema.is_mutable or any(norm in schema.name for norm in _NORMS)))


def _body_writes(argument: Node, gm: torch.nn.Module) -> bool:
    """Whether an argument is a graph that writes; a graph that is an input, and so not known, counts as one."""
    if argument.op == "get_attr":
        body = resolve(gm, str(argument.target))
        return isinstance(body, GraphModule) and any(writes(node, body) for node in body.graph.nodes)
    return argument.op == "placeholder" and not isinstance(argument.meta.get("val"), (torch.Tensor, torch.SymInt, int))


def interrupted(found: Match) -> bool:
    """Whether a tensor is written to between a match's first node and its last.

    A replacement is written at the last node's place and reads all its inputs there.
    """
    node, gm = min(found.nodes), found.anchor.graph.owning_module
    assert gm is not None, "a graph that is rewritten belongs to a module"
    while node is not found.anchor:
        if node not in found.nodes and writes(node, gm):
            return True
        node = node.next
    return False
