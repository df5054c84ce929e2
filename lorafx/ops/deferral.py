"""Deferral: a tensor that is computed when somebody asks for its values, and never if nobody does.

A graph whose loss does without logits still gives logits: `defer(head, dtype, x, weight, …)`. That tensor knows its
shape, dtype and device. A cast or `detach()` of it waits as well. Anything else that torch does with it runs the head,
once, in the modes (gradients, autocast) of the call that gave it, and with the history that it would have had if it
had been computed then. It holds on to the hidden state x. If x or a weight of the head has been written to since, using
it is an error, as autograd makes it one. Merging, which writes to weights, computes what still waits first (`settle`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from .. import ops  # noqa: F401, defines torch.ops.lorafx
from ..errors import DeferredError
from ..torch_private.tensors import DisableTorchFunctionSubclass, make_wrapper_subclass, version_of
from .calls import by_reference, is_plain
from .modes import autocast_dtype

ASKED = "asked"  # in a head's meta: how often somebody asked
NOT_FUSED = "not_fused"  # in the meta of a loss that needs its logits: why


def defer(head: Callable[..., Tensor], dtype: torch.dtype, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """`head(x, weight, *rest)`, computed when somebody asks: (…, out) of `dtype` for x (…, in), `weight` (out, in).

    It is computed at once where a compiler traces the call, or a vmap or forward-mode derivative goes through it.
    """
    given = (x, weight, *rest)
    plain = all(is_plain(value) for value in given if isinstance(value, Tensor))
    if torch.compiler.is_compiling() or by_reference() or not plain:
        return head(*given)
    return _Later(head, given).tensor((*x.shape[:-1], weight.shape[0]), dtype, x.device)


def is_deferral(node: Node) -> bool:
    """Whether a node gives a deferred tensor."""
    return node.op == "call_function" and node.target is defer


def heads(gm: GraphModule) -> dict[str, GraphModule]:
    """The graphs from a hidden state to what is deferred, by where the outer graph has them."""
    spots = [str(node.args[0].target) for node in gm.graph.nodes if is_deferral(node)]
    return {spot: gm.get_submodule(spot) for spot in spots}  # type: ignore[misc]


def describe_loss(gm: GraphModule) -> str:
    """How a graph computes its loss, for reports: `fused; logits asked for 3 times`, or why it is not fused."""
    op = torch.ops.lorafx.linear_cross_entropy.default
    fused = gm.graph.find_nodes(op="call_function", target=op)
    why = [node.meta[NOT_FUSED] for node in gm.graph.nodes if NOT_FUSED in node.meta]
    asked = sum(head.meta.get(ASKED, 0) for head in heads(gm).values())
    times = f"logits asked for {asked} time{'s' * (asked != 1)}" if fused and asked else ""
    return "; ".join(filter(None, ("fused" if fused else "", times, *(f"not fused: {reason}" for reason in why))))


def deferred_again(tensor: Deferred) -> tuple[tuple[Any, ...], Callable[[Sequence[Any]], Tensor]]:
    """What a deferred tensor is computed from, and a function that defers the same of other such inputs.

    The tensor itself is not waited for any longer: merging does not compute it.
    """
    later, described = tensor.later, (tensor.shape, tensor.dtype, tensor.device)
    _waiting.discard(later)
    return later.inputs, lambda inputs: _Later(later.function, tuple(inputs)).tensor(*described)


# Of the process, since a weight that is written to does not know the models that read it. Nothing is kept alive by it.
_waiting: weakref.WeakSet[_Later] = weakref.WeakSet()


def settle(weights: Sequence[Tensor]) -> None:
    """Compute what waits and reads one of `weights`, which are about to be written to.

    Where an input was already written to it is too late, and the error comes when somebody asks.
    """
    for later in list(_waiting):
        tensors = [value for value in later.inputs if isinstance(value, Tensor)]
        if any(_share_memory(tensor, weight) for weight in weights for tensor in tensors) and not later.is_too_late():
            later.values()


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two are one tensor, or one is what `detach` made of the other."""
    return a is b or (not isinstance(a, Deferred) and a.device == b.device and a.is_set_to(b))


class _Later:
    """How a deferred tensor is computed: a function, its inputs, and the modes of the call that put it off."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Any, ...], detached_from: _Later | None = None):
        self.origin = None if detached_from is None else weakref.ref(detached_from)
        self.function, self.inputs, self.states = function, inputs, _states(inputs)
        self.value: Tensor | None = None
        self.grad = torch.is_grad_enabled()
        self.device_type = next(value.device.type for value in inputs if isinstance(value, Tensor))
        self.autocast = autocast_dtype(self.device_type)
        _waiting.add(self)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Deferred:
        return _History.apply(self, shape, dtype, device, *self.inputs)

    def values(self) -> Tensor:
        """The tensor itself, computed once, with its history."""
        if self.value is None and self.origin is not None and (origin := self.origin()) is not None:
            self.value = origin.values().detach()
        if self.value is None:
            if isinstance(self.function, GraphModule):
                self.function.meta[ASKED] = self.function.meta.get(ASKED, 0) + 1
            self.value = self.run(self.grad)
        _waiting.discard(self)
        if not self.value.requires_grad:
            self.inputs = ()
        return self.value

    def is_too_late(self) -> bool:
        """Whether what this reads was written to since."""
        return _states(self.inputs) != self.states

    def run(self, grad: bool) -> Tensor:
        if self.value is not None:
            return self.value.detach()
        if self.is_too_late():
            raise DeferredError(
                "these logits are computed when they are asked for, and the hidden state or the head's weights were "
                "written to since the call; read them before that, or leave `fuse_loss` out of the pipeline"
            )
        inputs = [_computed(value) if isinstance(value, Deferred) else value for value in self.inputs]
        autocast = torch.autocast(self.device_type, dtype=self.autocast, enabled=self.autocast is not None)
        with torch.inference_mode(False), torch.set_grad_enabled(grad), autocast:
            return self.function(*inputs)


def _states(inputs: tuple[Any, ...]) -> list[tuple[torch.dtype, int]]:
    """What changes when tensors are written to or cast in place."""
    plain = [value for value in inputs if isinstance(value, Tensor) and not isinstance(value, Deferred)]
    return [(tensor.dtype, 0 if tensor.is_inference() else version_of(tensor)) for tensor in plain]


class _History(torch.autograd.Function):
    """Gives a deferred tensor a history, for gradients taken below torch's functions, which ask for no values."""

    @staticmethod
    def forward(ctx: Any, later: _Later, *described: Any) -> Deferred:
        ctx.later = later
        return Deferred(later, *described[:3])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [_computed(value) if isinstance(value, Deferred) else value for value in ctx.later.inputs]
        needs = ctx.needs_input_grad[4:]
        wanted = [value for value, needed in zip(inputs, needs) if needed]
        found = iter(torch.autograd.grad(ctx.later.values(), wanted, gradient, retain_graph=True, allow_unused=True))
        return None, None, None, None, *(next(found) if needed else None for needed in needs)


class Deferred(Tensor):
    """A tensor whose values `later` computes. Pickles and copies of it are plain tensors."""

    later: _Later

    @staticmethod
    def __new__(cls, later: _Later, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Deferred:
        made = make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made.later = later
        return made

    def __init__(self, *described: Any):
        super().__init__()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _KNOWN:
            with DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in (Tensor.retain_grad, Tensor.register_hook):
            raise DeferredError(
                "the loss of this call is computed without logits, so no gradient flows through them; leave "
                "`fuse_loss` out of the pipeline to have it"
            )
        dtype = _result_dtype(func, args, kwargs)
        if dtype is not None:
            return _put_off(args[0], func, args[1:], kwargs, dtype)
        args, kwargs = pytree.tree_map_only(Deferred, _computed, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Below autograd, which has recorded the operator already: it needs the values alone."""
        args, kwargs = pytree.tree_map_only(Deferred, lambda t: t.later.run(False), (args, kwargs or {}))
        return func(*args, **kwargs)


def _computed(tensor: Deferred) -> Tensor:
    return tensor.later.values()


def _put_off(tensor: Deferred, func: Any, args: Any, kwargs: Any, dtype: torch.dtype) -> Tensor:
    """A cast or `detach` of a deferred tensor."""
    if func is Tensor.detach:
        return _detached(tensor)
    if dtype == tensor.dtype:
        return tensor
    return _Later(lambda value: func(value, *args, **kwargs), (tensor,)).tensor(tensor.shape, dtype, tensor.device)


def _detached(tensor: Deferred) -> Tensor:
    """A deferred tensor of the same function on detached inputs: once `tensor` is gone, no history is kept."""
    later = tensor.later
    if later.value is not None:
        return later.value.detach()
    with torch.no_grad():
        inputs = tuple(value.detach() if isinstance(value, Tensor) else value for value in later.inputs)
        return _Later(later.function, inputs, later).tensor(tensor.shape, tensor.dtype, tensor.device)


def _result_dtype(func: Any, args: Any, kwargs: Any) -> torch.dtype | None:
    """The dtype that a cast or `detach` of a deferred tensor gives; None for all other calls, which need values."""
    if func is Tensor.detach:
        return args[0].dtype
    if func is Tensor.to and len(args) + len(kwargs) == 2:
        given = kwargs.get("dtype", args[-1])
        return given if isinstance(given, torch.dtype) else None
    return _CASTS.get(func) if len(args) == 1 and not kwargs else None


# What needs no values: casts, and what is known of a tensor besides them.
_CASTS = {
    Tensor.float: torch.float32,
    Tensor.double: torch.float64,
    Tensor.half: torch.float16,
    Tensor.bfloat16: torch.bfloat16,
}
_PROPERTIES = (
    *("shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes"),
    *("requires_grad", "is_leaf", "grad_fn"),
)
_PLACES = ("is_cuda", "is_cpu", "is_mps", "is_xpu", "is_meta", "is_sparse", "is_quantized", "is_mkldnn", "is_nested")
_METHODS = ("size", "dim", "ndimension", "numel", "nelement", "element_size", "is_floating_point", "is_complex")
_KNOWN = {getattr(Tensor, name).__get__ for name in (*_PROPERTIES, *_PLACES)} | {
    *(getattr(Tensor, name) for name in (*_METHODS, "stride", "__len__", "__hash__")),
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}
