"""Positions: the integers around which a mask may change its form, so that no sizes beyond them need be tried.

A mask is made of positions (integers that grow with sizes), which are added and compared. If nothing else is done to
them, a comparison changes only at sums of the integers that are written in the graph, and whatever is computed from
comparisons changes only where they do.
"""

from __future__ import annotations

import sys
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.utils import _pytree as pytree

from .sizes import SHAPE_ONLY, AtSizes, DependsOnData

aten = torch.ops.aten
_COMPARED = {aten.lt, aten.le, aten.gt, aten.ge, aten.eq, aten.ne}
_COMBINED = {
    *(aten.add, aten.sub, aten.rsub, aten.neg, aten.abs, aten.diff),
    *(aten.clamp, aten.minimum, aten.maximum, aten.where),
}
_MOVED = {
    *(aten.unsqueeze, aten.squeeze, aten.view, aten.reshape, aten.flatten, aten.unflatten, aten.expand, aten.repeat),
    *(aten.transpose, aten.permute, aten.t, aten.slice, aten.select, aten.cat, aten.stack, aten.tril, aten.triu),
    *(aten.alias, aten.detach, aten.clone, aten.contiguous, aten.lift_fresh_copy),
}
_CAST = {aten.to, aten._to_copy, aten.type_as}


def integers(ran: AtSizes) -> set[int]:
    """The integers at whose sums the computed values may change; `DependsOnData` if they may change elsewhere too."""
    found: set[int] = set()
    for at, node in ran.ran():
        value = at.values[node]
        if isinstance(node.meta["val"], torch.SymInt):
            found |= {abs(int(number)) for number in node.meta["val"].node.expr.atoms(sympy.Integer)}
        elif node.op == "get_attr" and isinstance(value, Tensor):
            found |= _constant(value)
        elif isinstance(node.target, OpOverload):
            leaves = pytree.tree_leaves((list(node.args), dict(node.kwargs)))
            operands = [at.values.get(operand) for operand in node.all_input_nodes]
            reads_positions = node.target not in SHAPE_ONLY and any(map(_is_of_positions, operands))
            if reads_positions and not _keeps_positions(node, operands, leaves, value):
                raise DependsOnData(f"{node.name} does more with positions than to add and compare them")
            found |= {abs(leaf) for leaf in leaves if type(leaf) is int}
    return found - {sys.maxsize}


def _constant(value: Tensor) -> set[int]:
    if value.numel() > 1:
        raise DependsOnData("a constant may be a table of positions")
    return set() if value.is_floating_point() else {abs(int(number)) for number in value.flatten()}


def _is_of_positions(value: Any) -> bool:
    """Whether a tensor holds integers that differ from place to place."""
    integral = isinstance(value, Tensor) and not value.is_floating_point() and value.dtype != torch.bool
    return integral and not _is_uniform(value)


def _is_uniform(value: Tensor) -> bool:
    return not value.numel() or bool((value == value.flatten()[0]).all())


def _keeps_positions(node: Node, operands: list[Any], leaves: list[Any], value: Any) -> bool:
    """Whether an operator on positions only adds, moves or casts them, or compares them to positions or integers."""
    packet = node.target.overloadpacket  # type: ignore[union-attr]
    if packet is aten.index:
        source = operands[0]
        return _is_uniform(source if source.dtype == torch.bool else source.diff(dim=-1))  # or positions again
    if any(type(leaf) is float for leaf in leaves) and packet is not aten.where:
        return False
    if packet in _COMPARED:
        return not any(isinstance(operand, Tensor) and operand.is_floating_point() for operand in operands)
    stays = isinstance(value, Tensor) and not value.is_floating_point()
    return stays and packet in _COMBINED | _MOVED | _CAST
