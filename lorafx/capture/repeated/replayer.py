"""The replayer answers a layer's questions as an earlier layer was answered, and traces nothing.

If the layer ends where the earlier one did, one node of the graph stands for it. If it asks for something else, the
replayer hands back to tracing: torch is asked for all of it, and what it gives takes the place of the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from ...torch_private.tracing import (
    FakeTensorMode,
    module_stack_of,
    node_of,
    replace_by,
    set_node,
    slot_of,
    within_modules,
    without_stack_traces,
)
from .answers import Known, New, mapped
from .marks import layer_like
from .record import Interrupted, Kind, Record, last_node

_VALUE = ("val", "tensor_meta", "stack_trace")  # in a node's meta: what it gives


class _Call(NamedTuple):
    """A call of a function that was answered and not traced."""

    func: Callable[..., Any]
    args: Any
    kwargs: Any
    answer: Any
    line: str
    modules: Any


class Replayer:
    """Follows, in the tree of what earlier layers asked, what this layer asks."""

    def __init__(self, record: Record, mode: FakeTensorMode):
        self.record, self.tracer, self.mode = record, record.tracer, mode
        self.calls: list[_Call] = []

    def knows(self, question: Hashable) -> bool:
        """Whether an earlier layer that asked all the same before asked this next."""
        return self.record.repeatable and question in self.record.at.then

    def answer(self, question: Hashable, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What that layer was answered, on tensors of this one."""
        step = self.record.at = self.record.at.then[question]
        answer = mapped(self._tensor, (Known, New), step.answer)
        self.calls.append(_Call(func, args, kwargs, answer, step.line, module_stack_of(self.tracer)))
        return answer

    def _tensor(self, stands: Known | New) -> Tensor:
        if isinstance(stands, New):
            made = stands.make(self.mode)
            self.record.add_made(made, None)
            return made
        found = self.record.find(stands.name)
        if found is None:  # nobody holds it any more, where a layer before did
            raise Interrupted
        return found

    def require_nothing_traced(self) -> None:
        """Raise `Interrupted` if something else has written nodes meanwhile: they would come before this layer's."""
        if last_node(self.tracer) is not self.record.before:
            raise Interrupted

    # --- the layer turns out to differ -------------------------------------------------------------------------------

    def trace(self) -> None:
        """Trace what was answered so far."""
        given = self.record.given  # its parameters have nodes only now
        self.record.given = [(tensor, slot or slot_of(tensor, self.tracer)) for tensor, slot in given]
        for call in self.calls:
            before = last_node(self.tracer)
            with within_modules(self.tracer, call.modules):
                traced = call.func(*call.args, **call.kwargs)
            while before is not last_node(self.tracer):
                before = before.next
                before.stack_trace = call.line
            for mine, real in zip(pytree.tree_leaves(call.answer), pytree.tree_leaves(traced)):
                if isinstance(mine, Tensor):
                    self._replace(mine, real)
        self.calls.clear()

    def _replace(self, mine: Tensor, real: Tensor) -> None:
        name = self.record.name(mine)
        if mine is not real:
            replace_by(mine, real, self.tracer)
        self.record.set_node(name, node_of(real, self.tracer))

    # --- the layer is like one before it -----------------------------------------------------------------------------

    def finish(self) -> bool:
        """The layer is done: whether it asked all that an earlier one did, and has one node in the graph now."""
        self.require_nothing_traced()
        if self.record.at.kind is None:
            return False
        self.calls.clear()  # they hold tensors that nobody else may want
        self._mark(self.record.at.kind)
        return True

    def _mark(self, kind: Kind) -> None:
        """Write one node for the layer: of what it made, it gives what somebody still holds."""
        record, tracer = self.record, self.tracer
        alive = [(number, tensor) for number, ref in enumerate(record.made) if (tensor := ref()) is not None]
        inputs, numbers = tuple([slot.proxy for slot in record.inputs]), tuple([number for number, _ in alive])
        with without_stack_traces(tracer):
            arguments = record.path, kind.number, inputs, numbers
            call = tracer.create_proxy("call_function", layer_like, arguments, {})
            call.node.meta["val"] = tuple([kind.nodes[number].meta["val"] for number in numbers])
            for place, (number, tensor) in enumerate(alive):
                proxy, meta = call[place], kind.nodes[number].meta
                proxy.node.meta |= {key: meta[key] for key in _VALUE if key in meta}
                set_node(tensor, tracer, proxy)
