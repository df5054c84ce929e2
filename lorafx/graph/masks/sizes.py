"""What a graph computes from sizes alone: nodes are run on real tensors, for chosen values of the graph's symbols."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from ...torch_private.tracing import values_of_symbols
from .. import resolve
from ..effects import may_share, must_stay, written
from ..modules import CAPTURED

aten = torch.ops.aten
# They read a tensor's shape and dtype, and not its values.
SHAPE_ONLY = {
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.new_full.default,
    aten.ones_like.default,
    aten.zeros_like.default,
    aten.full_like.default,
}


ONES = "ones"  # in an input's meta: whether it is known to be all ones


class DependsOnData(Exception):
    """A value depends on more than sizes."""


class AtSizes:
    """Runs nodes of a graph on the CPU, with `symbols` giving each symbol's value, and keeps the values of all it ran.

    For a block, `inputs` maps its inputs to nodes of the graph that runs it, and `outer` runs that graph's nodes.
    """

    def __init__(
        self,
        gm: GraphModule,
        symbols: Callable[[Any], int],
        inputs: Mapping[Node, Any] | None = None,
        outer: AtSizes | None = None,
    ):
        self.gm, self.symbols, self.inputs, self.outer = gm, symbols, inputs or {}, outer
        self.values: dict[Node, Any] = {}

    def __call__(self, node: Node) -> Any:
        """The value of a node. Raises `DependsOnData`."""
        if node not in self.values:
            self.values[node] = self._value(node)
        return self.values[node]

    def ran(self) -> list[tuple[AtSizes, Node]]:
        """The nodes that were run, each with what ran it: this or `outer`."""
        return [(self, node) for node in self.values] + (self.outer.ran() if self.outer else [])

    def _value(self, node: Node) -> Any:
        value = node.meta.get("val")
        if isinstance(value, (int, torch.SymInt)):
            return self._like(value)
        if node in self.inputs and self.outer and isinstance(self.inputs[node], Node):
            return self.outer(self.inputs[node])
        if node.meta.get(ONES):
            return torch.ones_like(self._like(value))
        if node.op == "get_attr" and str(node.target).startswith(f"{CAPTURED}."):  # a constant of the graph
            constant = resolve(self.gm, str(node.target))
            if isinstance(constant, Tensor):
                return constant.detach().cpu()
        if not isinstance(node.target, OpOverload) or must_stay(node, self.gm):
            raise DependsOnData(f"{node.name} is no operator on sizes")
        like = node.target in SHAPE_ONLY
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: self._like(n.meta["val"]) if like else self(n))
        args, kwargs = pytree.tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs))
        return node.target(*args, **kwargs)

    def _like(self, value: Any) -> Any:
        """A size as a number; a tensor as one of the same shape and dtype that takes no memory, its values unused."""
        if isinstance(value, Tensor):
            return torch.zeros((), dtype=value.dtype).expand([self._like(size) for size in value.shape])
        if not isinstance(value, torch.SymInt):
            return value
        expr = value.node.expr
        number = expr.xreplace({symbol: sympy.Integer(self.symbols(symbol)) for symbol in expr.free_symbols})
        if not number.is_Integer:
            raise DependsOnData(f"a size is {number}")
        return int(number)


def is_written_to(ran: AtSizes) -> bool:
    """Whether a node of the graph writes to one of the computed values, or to a view of one."""
    return any(_is_written_to(node, at.gm) for at, node in ran.ran())


def _is_written_to(node: Node, gm: GraphModule) -> bool:
    views = [user for user in node.users if may_share(user) and user.args[:1] == (node,)]
    return any(node in written(user, gm) for user in node.users) or any(_is_written_to(view, gm) for view in views)


def symbols_of(sizes: Sequence[Any]) -> list[Any]:
    """The symbols in some sizes, in order of their names."""
    found = {symbol for size in sizes if isinstance(size, torch.SymInt) for symbol in size.node.expr.free_symbols}
    return sorted(found, key=str)


def together(sizes: Sequence[Any], start: int, others: int = 2) -> Callable[[Any], int]:
    """Values for symbols: `start`, `start + 1`, … for those in these sizes, `others` for the rest.

    Symbols that had equal values at capture get equal values.
    """
    hints = next((values_of_symbols(size.node.shape_env) for size in sizes if isinstance(size, torch.SymInt)), {})
    grown = {hints.get(symbol): start + place for place, symbol in enumerate(symbols_of(sizes))}
    return lambda symbol: grown.get(hints.get(symbol), others)


def apart(sizes: Sequence[Any], start: int, others: int = 2) -> Callable[[Any], int]:
    """Values for symbols: `start`, `start + 1`, … for those in these sizes, `others` for all the rest."""
    grown = {symbol: start + place for place, symbol in enumerate(symbols_of(sizes))}
    return lambda symbol: grown.get(symbol, others)
