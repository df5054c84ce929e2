"""A recording: forward and backward of one kind of call at one set of sizes, launched with other values.

The arguments are copied to where they were when forward was recorded, except those that the call writes to (a static
cache): they are used where they are, so a recording serves the one cache. Parameters are read where the model has them.
Forward keeps what backward needs in the device's pool of memory until backward has run, so while one call waits for
its backward, no other recording may run (`pool.py`). Gradients go to the parameters as autograd brings them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ...graph.modules import CAPTURED, PLAIN
from ...ops.calls import without_derivative
from ...ops.modes import autocast_dtype
from ...torch_private.graphs import C_FUNCTIONS
from ...torch_private.tensors import fast_version_of, is_batched_gradient
from .device import Cuda
from .outputs import Outputs
from .pool import Ticket

Run = Callable[..., Sequence[Any]]
_needs_grad = Tensor.requires_grad.__get__  # type: ignore[attr-defined]


class ModelTensors:
    """The tensors that a graph may read from its module tree, as they are at a call."""

    def __init__(self, gm: GraphModule):
        # What only the graph has is never written to.
        modules = [module for path, module in gm.named_modules() if path.split(".")[0] != CAPTURED]
        self._parameters = _each_once([module._parameters for module in modules])
        self._buffers = _each_once([module._buffers for module in modules])
        self._owners = self._parameters + self._buffers
        attributes = [(vars(module), name) for module in modules for name, value in vars(module).items() if _is(value)]
        self._plain = [*attributes, *((vars(gm), name) for name in gm.meta.get(PLAIN, []))]

    def read(self) -> list[Tensor]:
        """Each tensor, in the same order each time: parameters, then buffers and plain attributes."""
        owned = [tensor for owned in self._owners for tensor in owned.values() if tensor is not None]
        return [*owned, *(value for owner, name in self._plain if _is(value := owner.get(name)))]

    def parameters(self) -> list[nn.Parameter]:
        """The parameters among them."""
        return [parameter for owned in self._parameters for parameter in owned.values() if parameter is not None]

    @contextmanager
    def kept(self, others: list[Tensor]) -> Iterator[None]:
        """With buffers, and `others`, as they are now, whatever is written to them meanwhile."""
        tensors = [*others, *(buffer for owned in self._buffers for buffer in owned.values() if buffer is not None)]
        before = [tensor.detach().clone() for tensor in tensors]
        yield
        for tensor, values in zip(tensors, before):
            tensor.data.copy_(values)

    @contextmanager
    def replaced(self, others: dict[int, nn.Parameter]) -> Iterator[None]:
        """With other parameters in the place of those whose ids are given."""
        named = [(owned, name, tensor) for owned in self._owners for name, tensor in owned.items()]
        before = [each for each in named if id(each[2]) in others]
        try:
            for owned, name, tensor in before:
                owned[name] = others[id(tensor)]
            yield
        finally:
            for owned, name, tensor in before:
                owned[name] = tensor


def _each_once(owners: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({id(owned): owned for owned in owners if owned}.values())


def _is(value: Any) -> bool:
    return isinstance(value, Tensor)


def state_of(tensors: Sequence[Tensor]) -> tuple[list[int], list[bool]]:
    """Where tensors lie, and which want gradients: a recording is right as long as that stays so."""
    return list(map(Tensor.data_ptr, tensors)), list(map(_needs_grad, tensors))


class Recording:
    """Forward of a call, recorded when this is made, and its backward, recorded when it is first asked for."""

    def __init__(self, device: Cuda, run: Run, model: ModelTensors, leaves: list[Any], written: set[int]):
        self.device, self._run, self._model, self._writes = device, run, model, written
        self._written = written = in_place(written, leaves)
        self._autocast = autocast_dtype(device.device.type)
        self._has_versions = not any(map(Tensor.is_inference, model.parameters()))  # those of inference mode have none
        tensors = model.read()
        if not all(map(device.holds, tensors)):
            raise ValueError(f"a tensor of the model is not on {device.device}, and would be taken for a constant")
        self._state = state_of(tensors)
        self._places = {n: _place(leaves[n]) for n in written}
        # Aliases, so that gradients are taken with respect to them, and nothing of the parameters' own is recorded.
        self._aliases = {id(t): nn.Parameter(t.detach()) for t in tensors if t.requires_grad}
        self._leaves = [leaf if n in written else _buffer(leaf) for n, leaf in enumerate(leaves)]
        stand_ins = [*self._leaves, *(self._aliases.get(id(t), t) for t in tensors)]
        # A tied parameter's gradient is wanted once: autograd would give the whole for each of its places.
        wanted = {id(t): n for n, t in enumerate(stand_ins) if isinstance(t, Tensor) and t.requires_grad}
        self._wanted = list(wanted.values())
        self._inputs = [stand_ins[n] for n in self._wanted]
        found, self._launch = device.record(self._forward)
        self._outputs = Outputs(found, {id(t): n for n, t in enumerate(stand_ins) if isinstance(t, Tensor)})
        self._backward: Backward | None = None
        self.failed = ""  # why backward could not be recorded
        self.needs_backward = any(map(_needs_grad, self._outputs.computed))

    def fits(self, leaves: list[Any]) -> bool:
        """Whether the model's tensors, and the arguments that are written to, are where they were."""
        if self._writes and in_place(self._writes, leaves) != self._written:
            return False
        moved = any(_place(leaves[n]) != place for n, place in self._places.items())
        return not moved and state_of(self._model.read()) == self._state

    def replay(self, leaves: list[Any]) -> list[Any]:
        """The leaves of the output of a call that fits."""
        given = [*leaves, *self._model.read()]
        if not self.needs_backward:
            self._launch_with(leaves)
            return self._outputs.make(given, [value.clone() for value in self._outputs.computed])
        computed = _Replay.apply(self, leaves, *(given[n] for n in self._wanted))
        return self._outputs.make(given, computed)

    def _forward(self) -> list[Any]:
        torch.clear_autocast_cache()  # of casts that are no part of the recording
        try:
            with self._model.replaced(self._aliases):
                return list(self._run(*self._leaves))
        finally:
            torch.clear_autocast_cache()  # of casts that the next recording writes over

    def _launch_with(self, leaves: list[Any]) -> None:
        for n, (own, leaf) in enumerate(zip(self._leaves, leaves)):
            if n in self._written:
                if not leaf.is_inference():
                    torch.autograd.graph.increment_version(leaf)
            elif isinstance(own, Tensor):
                own.data.copy_(leaf, non_blocking=True)  # its version is what autograd saved
        self._launch()

    def gradients(self, ticket: Ticket, given: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        """The gradients of the inputs that want one, of those of the computed outputs."""
        if not self.device.pool.holds(ticket):
            raise RuntimeError(
                "backward a second time through a call that was replayed from a CUDA graph, which keeps nothing after "
                "the first; leave `mode` out to do that"
            )
        if ticket.versions != self.versions():
            raise RuntimeError(
                "backward through a call that was replayed from a CUDA graph, and parameters were written to since, as "
                "an optimizer or merging does; call backward before that"
            )
        if any(gradient is not None and is_batched_gradient(gradient) for gradient in given):
            ticket.done = True
            return self._recomputed(ticket, given)
        wanted = [n for n, gradient in enumerate(given) if gradient is not None]
        if self._backward is None and not self.failed:
            try:
                self._backward = Backward(self.device, self._outputs.computed, self._inputs, wanted)
            except Exception as error:
                self.failed = why_not(error)
        ticket.done = True
        if self._backward is None or self._backward.wanted != wanted:
            return self._recomputed(ticket, given)
        return self._backward.run(given)

    def versions(self) -> list[int]:
        """How often each parameter was written to: what backward reads is as it was where these are the same."""
        return list(map(fast_version_of, self._model.parameters())) if self._has_versions else []

    def _recomputed(self, ticket: Ticket, given: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        """The same without a recording, for gradients of other outputs than those it was recorded for."""
        autocast = torch.autocast(self.device.device.type, dtype=self._autocast, enabled=self._autocast is not None)
        with self._model.kept([self._leaves[n] for n in self._written]):  # the call has written to them already
            with self.device.with_random_state(ticket.random), torch.enable_grad(), autocast:
                found = Outputs(self._forward(), {id(t): 0 for t in (*self._leaves, *self._aliases.values())})
            pairs = [(value, g) for value, g in zip(found.computed, given) if g is not None]
            roots, gradients = zip(*pairs)
            return list(torch.autograd.grad(roots, self._inputs, gradients, allow_unused=True))


class Backward:
    """Backward of a recorded forward, for the gradients of some of its outputs.

    All gradients are written into one tensor for each dtype, so that one copy a dtype makes them the caller's own.
    """

    def __init__(self, device: Cuda, outputs: list[Tensor], inputs: list[Tensor], wanted: list[int]):
        self.wanted = wanted
        roots = [outputs[n] for n in wanted]
        self._given = [torch.empty_like(root) for root in roots]
        (self._flat, self._numbers), self._launch = device.record(lambda: _flat_gradients(roots, self._given, inputs))
        self._shapes = {
            dtype: [torch.empty(inputs[n].shape, device="meta") for n in numbers]
            for dtype, numbers in self._numbers.items()
        }
        self._inputs = len(inputs)

    def run(self, given: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        """The gradient of each input, None where it has none."""
        for own, n in zip(self._given, self.wanted):
            own.copy_(given[n])  # type: ignore[arg-type]
        self._launch()
        found: list[Tensor | None] = [None] * self._inputs
        for dtype, flat in self._flat.items():
            views = C_FUNCTIONS.unflatten_dense_tensors(flat.clone(), self._shapes[dtype])
            for number, view in zip(self._numbers[dtype], views):
                found[number] = view
        return found


def _flat_gradients(
    roots: list[Tensor], given: list[Tensor], inputs: list[Tensor]
) -> tuple[dict[torch.dtype, Tensor], dict[torch.dtype, list[int]]]:
    """The gradients one after the other in a tensor for each dtype, and the numbers of the inputs that they are of."""
    found = torch.autograd.grad(roots, inputs, given, allow_unused=True)
    numbers: dict[torch.dtype, list[int]] = {}
    for n, gradient in enumerate(found):
        if gradient is not None:
            numbers.setdefault(gradient.dtype, []).append(n)
    return {d: torch.cat([found[n].reshape(-1) for n in own]) for d, own in numbers.items()}, numbers  # type: ignore[union-attr]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: Recording, leaves: list[Any], *wanted: Tensor) -> tuple[Tensor, ...]:
        ctx.recording, ctx.ticket = recording, Ticket(recording.device.random_state(), recording.versions())
        recording.device.pool.take(ctx.ticket)
        recording._launch_with(leaves)
        ctx.set_materialize_grads(False)
        computed = recording._outputs.computed
        copies = tuple([value.detach().clone() for value in computed])
        ctx.mark_non_differentiable(*(c for c, value in zip(copies, computed) if not value.requires_grad))
        return copies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        with ctx.recording.device.turn(), torch.no_grad():
            found = ctx.recording.gradients(ctx.ticket, gradients)
        if torch.is_grad_enabled():
            found = [gradient if gradient is None else without_derivative(gradient, _ONCE) for gradient in found]
        return None, None, *found


_ONCE = "a call that was replayed from a CUDA graph has no second derivative; leave `mode` out to take one"


def in_place(written: set[int], leaves: Sequence[Any]) -> set[int]:
    """The numbers of arguments that are used where they are: the written ones, and those that share their memory."""
    memory = {_memory(leaves[n]) for n in written}
    shared = (n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and _memory(leaf) in memory)
    return written.union(shared) if written else written


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.stride()


def why_not(error: Exception) -> str:
    """What people are told of an error while recording."""
    return f"not recorded: {type(error).__name__}: {error}".splitlines()[0]


def _buffer(leaf: Any) -> Any:
    """Memory for an argument, in which its values stand before each replay."""
    return leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf
