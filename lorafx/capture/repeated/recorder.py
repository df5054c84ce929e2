"""Repeated layers are traced once: a layer that asks for the same operators as one before it is not traced again.

The Python of every layer runs. While it runs, what it asks of torch is compared with what layers before it asked for,
on tensors of the same description, and as long as that is the same the answers are theirs. So nothing is assumed about
a layer: its class, its number and its place in a cache do what they do. Where it departs, what it asked for so far is
traced after all, and then the rest.
"""

from __future__ import annotations

import functools
import itertools
import operator
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import (
    _ProxyTensor,
    disable_proxy_modes_tracing,
    get_proxy_mode,
    get_proxy_slot,
    maybe_enable_thunkify,
    set_proxy_slot,
)
from torch.fx.node import has_side_effect
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._mode_utils import no_dispatch

from ...graph import writes
from ...graph.blocks import repeated_modules
from ...graph.description import operand_key, traced_tensor_key
from ...graph.effects import reaches_out
from ...graph.regions import is_size
from ...ops.modes import modes
from .answers import Known, New, Result, depends_on_data, mapped
from .parameters import Hidden


class _Layer(HigherOrderOperator):
    """Stands in a captured graph for a layer.

    As `layer(path, kind, inputs, outputs, nodes)` after a layer that was traced, with all that may be wanted of it; and
    as `layer(path, kind, inputs, numbers)` instead of one that is like it, giving the outputs of these numbers.
    """

    def __init__(self) -> None:
        super().__init__("lorafx_layer")

    def __call__(self, *args: Any) -> Any:
        raise NotImplementedError("stands for a layer while a graph is made")


layer_like = has_side_effect(_Layer())  # it may not be dropped


_VALUE = ("val", "tensor_meta", "stack_trace")  # in a node's meta: what it gives


@dataclass
class _Kind:
    """A layer that was traced and that others can be like."""

    number: int
    nodes: list[Node]  # that give what it made


@dataclass
class _Step:
    """What may be asked next, and what the answer is to what was asked last."""

    answer: Any = None
    then: dict[Hashable, _Step] = field(default_factory=dict)
    kind: _Kind | None = None
    line: str = ""  # the stack trace of what it became in the graph


class Interrupted(Exception):
    """A layer does something between operators that would be in the graph too late."""


class Once:
    """Calls of the repeated layers at `part` of a mirror while that is exported."""

    def __init__(self, root: nn.Module, part: str):
        self.root, self.start, self.running = root, _Step(), False
        self.mode: Any = None
        self.modes: Hashable = None
        self.numbers = itertools.count()
        self.kept: list[Any] = []  # so that an id stays one object's
        paths = {module: path for path, module in root.named_modules()}
        layers = repeated_modules(root.get_submodule(part))
        self.hidden = Hidden(root, layers)
        for layer in layers:
            layer.__dict__["forward"] = functools.wraps(layer.forward)(
                functools.partial(self._call, layer, paths[layer], layer.forward)
            )

    def called(self) -> Hidden:
        """The context in which the model is called."""
        self.modes = modes()
        return self.hidden

    def _call(self, layer: nn.Module, path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        mode = get_proxy_mode()
        self.mode = torch._guards.detect_fake_mode()
        if mode is None or self.running or modes() != self.modes:  # regions of other modes are graphs of their own
            return forward(*args, **kwargs)
        self.running = True
        try:
            tape = _Tape(self, layer, path, mode.tracer)
            with tape, maybe_enable_thunkify():  # what Python computes of sizes is a node if somebody uses it
                output = forward(*args, **kwargs)
            tape.finish()
            return output
        finally:
            self.running = False

    @functools.cached_property
    def places(self) -> Counter[int]:
        """How many places of the model each of its tensors, as they are while it is exported, is found at."""
        named = self.root.named_parameters(remove_duplicate=False), self.root.named_buffers(remove_duplicate=False)
        return Counter(id(tensor) for _, tensor in itertools.chain(*named))


class _Tape(TorchFunctionMode):
    """What one layer asks of torch, in order: answered as before as long as it is as before, traced from then on."""

    def __init__(self, once: Once, layer: nn.Module, path: str, tracer: Any):
        super().__init__()
        self.once, self.path, self.tracer, self.at = once, path, tracer, once.start
        self.replaying = bool(self.at.then)
        self.own_parameters = list(layer.parameters())
        self.own = {id(t): name for name, t in (*layer.named_parameters(), *layer.named_buffers())}
        self.names: dict[int, tuple[weakref.ref[Tensor], Hashable]] = {}
        self.tensors: dict[Hashable, Callable[[], Tensor | None]] = {}
        self.given: list[tuple[Tensor, Any]] = []  # what was not made here, and what stood for it at first use
        self.inputs: list[Any] = []  # what stands for those that are not the layer's own
        self.made: list[weakref.ref[Tensor]] = []
        self.nodes: list[Node | None] = []  # of what was made
        self.done: list[tuple[Any, ...]] = []
        if not self.replaying:
            once.hidden.trace(self.own_parameters, tracer)
        self.before = self._last()
        self.link: tuple[_Step, Hashable, _Step] | None = None
        self.learning = True  # that others can be like this layer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.learning:
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            asked = operand_key((func, args, kwargs), self._name, self.once.kept)
            if self.replaying:
                self._require_nothing_traced()
            if self.replaying and self.learning and asked in self.at.then:
                self.at = self.at.then[asked]
                answer = mapped(self._answered, (Known, New), self.at.answer)
                self.done.append((func, args, kwargs, answer, self.at.line, self.tracer.module_stack.copy()))
                return answer
        if self.replaying:
            self._depart()
        answer = func(*args, **kwargs)
        if not self.learning:
            return answer
        with torch._C.DisableTorchFunction():
            step = _Step(mapped(self._learnt, Tensor, answer), line=self._last().stack_trace or "")
            self.learning &= not depends_on_data(answer)
            if self.link is None:
                self.link = self.at, asked, step  # for others to find, if they can be like this layer in the end
            else:
                self.at.then[asked] = step
            self.at = step
        return answer

    # --- names of tensors --------------------------------------------------------------------------------------------

    def _name(self, tensor: Tensor) -> Hashable:
        known = self.names.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        own = self.own.get(id(tensor))
        stands = get_proxy_slot(tensor, self.tracer, None)
        self.given.append((tensor, stands))
        if own is not None and self.once.places[id(tensor)] < 2:
            return self._named(tensor, ("own", own, traced_tensor_key(tensor)))
        self.inputs.append(stands)
        self.learning &= stands is not None and not isinstance(tensor, nn.Parameter)
        return self._named(tensor, ("input", len(self.inputs), traced_tensor_key(tensor)))

    def _named(self, tensor: Tensor, name: Hashable) -> Hashable:
        reference = weakref.ref(tensor)
        self.names[id(tensor)], self.tensors[name] = (reference, name), reference
        return name

    # --- answers -----------------------------------------------------------------------------------------------------

    def _learnt(self, tensor: Tensor) -> Known | New:
        """A tensor of an answer, as others can be given it."""
        node = self._node(tensor)
        known = self.names.get(id(tensor))
        if (known is not None and known[0]() is tensor) or id(tensor) in self.own:
            name = self._name(tensor)
            if isinstance(name, tuple) and name[0] == "made":
                self.nodes[name[1]] = node  # written to in place
            return Known(name)
        self.learning &= node is not None and type(tensor) is FakeTensor
        new = self._new(tensor, node)
        with no_dispatch():  # of its own memory: what is written to it is not written to this tensor
            like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return New(new, like, tensor.device, tensor.requires_grad)

    def _new(self, tensor: Tensor, node: Node | None) -> int:
        number = len(self.made)
        self._named(tensor, ("made", number))
        self.made.append(weakref.ref(tensor))
        self.nodes.append(node)
        return number

    def _answered(self, tensor: Known | New) -> Tensor:
        if isinstance(tensor, Known):
            found = self.tensors[tensor.name]()
            if found is None:
                raise Interrupted
            return found
        made = tensor.make(self.once.mode)
        self._new(made, None)
        return made

    # --- the end of agreement ----------------------------------------------------------------------------------------

    def _depart(self) -> None:
        """Trace what was answered from memory so far."""
        self.replaying, here = False, self.tracer.module_stack
        self.once.hidden.trace(self.own_parameters, self.tracer)
        self.given = [(tensor, stands or get_proxy_slot(tensor, self.tracer, None)) for tensor, stands in self.given]
        for func, args, kwargs, answer, line, stack in self.done:
            self.tracer.module_stack, before = stack, self._last()
            traced = func(*args, **kwargs)
            while before is not self._last():
                before = before.next
                before.stack_trace = line
            for mine, real in zip(pytree.tree_leaves(answer), pytree.tree_leaves(traced)):
                if isinstance(mine, Tensor):
                    self._become(mine, real)
        self.tracer.module_stack = here
        self.done.clear()

    def _require_nothing_traced(self) -> None:
        if self._last() is not self.before:
            raise Interrupted

    def _last(self) -> Node:
        return next(iter(reversed(self.tracer.graph.nodes)))

    def _become(self, mine: Tensor, real: Tensor) -> None:
        name = self._name(mine)
        if mine is not real:
            set_proxy_slot(mine, self.tracer, get_proxy_slot(real, self.tracer))
            mine.constant = real.constant  # type: ignore[attr-defined]
            if mine.requires_grad:  # as the result of an operator, which may be written to in place
                with torch._C.DisableTorchFunction(), disable_proxy_modes_tracing():
                    Result.apply(mine.requires_grad_(False), real)
        if isinstance(name, tuple) and name[0] == "made":
            self.nodes[name[1]] = self._node(real)

    def _node(self, tensor: Tensor) -> Node | None:
        slot = get_proxy_slot(tensor, self.tracer, None)
        return None if slot is None else slot.proxy.node

    def finish(self) -> None:
        """The layer is done: it is like one before it, or another kind that others may be like."""
        if self.replaying:
            self._require_nothing_traced()
            if self.at.kind is not None:
                self._fold(self.at.kind)
                return
            self._depart()
        nodes = list(self._traced())
        if self.learning and self.at.kind is None and self._stands_alone(nodes):
            if self.link is not None:
                step, asked, following = self.link
                step.then[asked] = following
            kind = self.at.kind = _Kind(next(self.once.numbers), self.nodes)  # type: ignore[arg-type]
            inputs = tuple([stands.proxy for stands in self.inputs])
            outputs, inside = (tuple([self.tracer.proxy(n) for n in every]) for every in (self.nodes, nodes))
            self.tracer.create_proxy("call_function", layer_like, (self.path, kind.number, inputs, outputs, inside), {})
            for tensor, stands in self.given:  # a cast that changes nothing gives the same tensor, as another node
                set_proxy_slot(tensor, self.tracer, stands)

    def _fold(self, kind: _Kind) -> None:
        """Put one node where the layer was: of what it made, whatever somebody still has is what it gives."""
        self.done.clear()
        alive = [(number, tensor) for number, ref in enumerate(self.made) if (tensor := ref()) is not None]
        inputs = tuple([stands.proxy for stands in self.inputs])
        numbers = tuple([number for number, _ in alive])
        record, self.tracer.record_stack_traces = self.tracer.record_stack_traces, False
        call = self.tracer.create_proxy("call_function", layer_like, (self.path, kind.number, inputs, numbers), {})
        call.node.meta["val"] = tuple([kind.nodes[number].meta["val"] for number in numbers])
        for place, (number, tensor) in enumerate(alive):
            proxy = call[place]
            proxy.node.meta |= {key: kind.nodes[number].meta[key] for key in _VALUE if key in kind.nodes[number].meta}
            set_proxy_slot(tensor, self.tracer, _ProxyTensor(proxy, None))
        self.tracer.record_stack_traces = record

    def _stands_alone(self, nodes: list[Node]) -> bool:
        """Whether the layer's nodes depend on its tensors, its inputs and sizes alone, and write to none of them."""
        inside = set(nodes)
        given = {stands.proxy.node for _, stands in self.given if stands is not None}
        return (
            len(nodes) > 2
            and len(given) == len(self.given)
            and inside.issuperset(self.nodes)  # type: ignore[arg-type]
            and all(map(_may_be_in_block, nodes))
            and not any(writes(node, self.once.root) and reaches_out(node, inside) for node in nodes)
            and all(n in inside or n in given or is_size(n) for node in nodes for n in node.all_input_nodes)
        )

    def _traced(self) -> Iterator[Node]:
        """The nodes of the layer, without those that only compute sizes of what was there before."""
        node = self.before.next
        inside: set[Node] = set()
        while node.op != "root":
            if not is_size(node) or not inside.isdisjoint(node.all_input_nodes):
                inside.add(node)
                yield node
            node = node.next


def _may_be_in_block(node: Node) -> bool:
    return (
        node.op == "get_attr" or isinstance(node.target, OpOverload) or is_size(node) or node.target is operator.getitem
    )
