"""Free counters: integer arguments that graphs are not specialised on.

Integers are constants of a graph at first: the model's Python may do anything with them. One that counts (tokens, what
a cache holds) differs from one call to the next, and a graph for each number would be too many. So where calls differ
in such integers alone, and the model computes the same with a symbol in their place, they become inputs of the graph.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from ..capture.caches import is_length
from ..capture.export import trace_part
from ..capture.loops import Loops
from ..errors import CaptureError
from .call_key import FREE_COUNTER, Call, CallKey, Leaf


class FreeCounters:
    """Which integers are free, by the module and the structure of the arguments; leaves go by their numbers."""

    def __init__(self, loops: Loops) -> None:
        self._loops = loops  # of the model: what loops over a size is not captured
        self._free: dict[Hashable, frozenset[int]] = {}
        self._constant: dict[Hashable, frozenset[int]] = {}  # integers that were tried, and must stay constants

    def applied(self, key: CallKey) -> CallKey:
        """The key with any number in the place of each free integer."""
        free = self._free.get((key.part, key.structure))
        if not free:
            return key
        leaves = [FREE_COUNTER if i in free and is_counter(leaf) else leaf for i, leaf in enumerate(key.leaves)]
        return key._replace(leaves=tuple(leaves))

    def learn(self, call: Call, key: CallKey, names: Sequence[str], kept: Iterable[CallKey]) -> None:
        """Free what a cache counts, and what alone tells a new kind of call from one that is kept.

        `names` are those of the leaves.
        """
        place = key.part, key.structure
        lengths = {i for i, name in enumerate(names) if is_length(name) and is_counter(key.leaves[i])}
        changed = frozenset().union(*(changed_counters(key, other) for other in kept)) - lengths
        changed -= self._constant.get(place, frozenset())
        if changed and not _computes_the_same(call, changed | lengths, self._loops):
            self._constant[place] = self._constant.get(place, frozenset()) | changed
            changed = frozenset()
        if changed or lengths:
            self._free[place] = self._free.get(place, frozenset()) | changed | lengths


def _computes_the_same(call: Call, free: frozenset[int], loops: Loops) -> bool:
    """Whether a graph with symbols for these integers does what one with constants does, in this call.

    A model that asks `isinstance(n, int)` takes another way with a symbol.
    """
    try:
        graphs = [trace_part(call.tree, call.path, call.args, call.kwargs, f, loops).graph for f in (free, ())]
    except CaptureError:
        return False
    symbolic, plain = map(_computed, graphs)
    return symbolic == plain


def _computed(graph: Graph) -> list[Any]:
    """The operators of a graph and its output, each with what it is given in the call that was captured."""
    nodes = [node for node in graph.nodes if node.op == "output" or isinstance(node.target, OpOverload)]
    return [
        (node.target, [_given(leaf) for leaf in pytree.tree_leaves((node.args, node.kwargs))])
        for node in nodes
        if node.target is not torch.ops.aten.sym_size.int
    ]


def _given(leaf: Any) -> Any:
    """The number that a node gives in the call that was captured; any tensor is like any other."""
    if not isinstance(leaf, Node):
        return leaf
    value = leaf.meta.get("val")
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.hint
    return value if isinstance(value, (int, float)) else Node


def is_counter(leaf: Leaf) -> bool:
    """Whether a leaf is an integer that may become free. 0 and 1 stay constants: they often mean more than a number."""
    return len(leaf) == 2 and leaf[0] is int and leaf != FREE_COUNTER and leaf[1] > 1


def changed_counters(new: CallKey, old: CallKey) -> frozenset[int]:
    """The numbers of the leaves in which two calls differ, if these are counters and there is no other difference."""
    if new._replace(leaves=()) != old._replace(leaves=()):
        return frozenset()
    pairs = [(number, a, b) for number, (a, b) in enumerate(zip(new.leaves, old.leaves)) if a != b]
    counters = all(is_counter(a) and is_counter(b) for _, a, b in pairs)
    return frozenset(number for number, _, _ in pairs) if counters else frozenset()
