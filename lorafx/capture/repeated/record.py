"""What one layer asked of torch while it ran and what it was answered, with a name for each tensor in either.

Layers are alike if they ask for the same functions on tensors of the same names and get answers of the same names. A
tensor is named by the part it plays:

    ("own", "up.weight", description)   a parameter or buffer of the layer that is found nowhere else in the model
    ("input", 2, description)           the second tensor that came from outside
    ("made", 7)                         the eighth tensor among the answers
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sympy import Expr
from torch import Tensor, nn
from torch.fx import Node

from ...graph.description import traced_tensor_key
from ...torch_private.tracing import slot_of
from .answers import Known, mapped


class Interrupted(Exception):
    """A layer does something that cannot be replayed: the model is captured with every layer traced."""


@dataclass
class Kind:
    """Layers that are alike, of which the first was traced."""

    number: int
    nodes: list[Node]  # what computes each tensor that was made


@dataclass
class Step:
    """One question and its answer, in a tree that holds what all layers asked: layers part where their questions do."""

    answer: Any = None  # with `Known` and `New` in the place of tensors
    line: str = ""  # the stack trace of the node that it became
    then: dict[Hashable, Step] = field(default_factory=dict)  # by the question that came next
    kind: Kind | None = None  # of layers that ask nothing more


def rename_sizes(start: Step, replace: Callable[[Expr], Expr]) -> None:
    """Let a tree name sizes by other expressions, since torch finds out on the way that two symbols are equal."""

    def new(name: Any) -> Any:
        if isinstance(name, Known):
            return Known(new(name.name))
        if type(name) is tuple:
            return tuple(map(new, name))
        return replace(name) if isinstance(name, Expr) else name

    pending = [start]
    while pending:
        step = pending.pop()
        step.answer = mapped(new, Known, step.answer)
        before, step.then = step.then, {}
        for question, following in before.items():
            step.then.setdefault(new(question), following)
        pending += step.then.values()


class Record:
    """One run of a layer."""

    def __init__(self, layer: nn.Module, path: str, start: Step, places: Mapping[int, int], tracer: Any):
        self.path, self.tracer, self.places = path, tracer, places
        self.at = start  # the last question and its answer
        self.before = last_node(tracer)  # of the graph as it was when the layer began
        self.repeatable = True  # whether another layer can be like this one
        self.own = {id(t): name for name, t in (*layer.named_parameters(), *layer.named_buffers())}
        self.given: list[tuple[Tensor, Any]] = []  # tensors that were there before, and their slots then
        self.inputs: list[Any] = []  # the slots of those that are not its own
        self.made: list[weakref.ref[Tensor]] = []
        self.nodes: list[Node | None] = []  # that compute what the layer made; None before it is traced
        self._names: dict[int, tuple[weakref.ref[Tensor], Hashable]] = {}
        self._tensors: dict[Hashable, weakref.ref[Tensor]] = {}

    def name(self, tensor: Tensor) -> Hashable:
        """A tensor's name. One that was not seen yet is the layer's own, or its next input."""
        if (known := self.known_name(tensor)) is not None:
            return known
        slot = slot_of(tensor, self.tracer)
        self.given.append((tensor, slot))
        if self.is_own(tensor) and self.places[id(tensor)] < 2:
            return self._call(tensor, ("own", self.own[id(tensor)], traced_tensor_key(tensor)))
        self.inputs.append(slot)
        self.repeatable &= slot is not None and not isinstance(tensor, nn.Parameter)
        return self._call(tensor, ("input", len(self.inputs), traced_tensor_key(tensor)))

    def known_name(self, tensor: Tensor) -> Hashable | None:
        """The name of a tensor in this record; None for one that the layer has not seen."""
        reference, name = self._names.get(id(tensor), (None, None))
        return name if reference is not None and reference() is tensor else None

    def is_own(self, tensor: Tensor) -> bool:
        """Whether a tensor is one of the layer's parameters or buffers."""
        return id(tensor) in self.own

    def find(self, name: Hashable) -> Tensor | None:
        """The tensor of this name, unless nobody holds it any more."""
        return self._tensors[name]()

    def add_made(self, tensor: Tensor, node: Node | None) -> None:
        """Note a tensor that was made for an answer."""
        self._call(tensor, ("made", len(self.made)))
        self.made.append(weakref.ref(tensor))
        self.nodes.append(node)

    def set_node(self, name: Hashable, node: Node | None) -> None:
        """Note what computes a tensor now, if it was made here: it was traced, or written to in place."""
        if isinstance(name, tuple) and name[0] == "made":
            self.nodes[name[1]] = node

    def _call(self, tensor: Tensor, name: Hashable) -> Hashable:
        reference = weakref.ref(tensor)
        self._names[id(tensor)], self._tensors[name] = (reference, name), reference
        return name


def last_node(tracer: Any) -> Node:
    """The last node of the graph that is being written."""
    return next(iter(reversed(tracer.graph.nodes)))
