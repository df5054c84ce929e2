"""What torch.export traces with: fake tensors, nodes that stand for tensors, and what it notes of each node."""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
import sys
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch import config as functorch_config
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.export.dynamic_shapes import _IntWrapper
from torch.fx import GraphModule, Node, Proxy
from torch.fx._symbolic_trace import _orig_module_call, _orig_module_getattr
from torch.fx.experimental.proxy_tensor import (
    _ProxyTensor,
    disable_proxy_modes_tracing,
    get_proxy_mode,
    get_proxy_slot,
    maybe_enable_thunkify,
    set_proxy_slot,
)
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._sympy.value_ranges import ValueRanges

from .tensors import DisableTorchFunction

# A number that may become a symbol: by torch's name of the argument, the tensor's method that gives it, and its place.
Number = tuple[str, str, int | None]

__all__ = [
    # Tensors without values, and the mode that makes them. Without them, new nodes would have no shapes.
    "FakeTensor",
    "FakeTensorMode",
    "detect_fake_mode",
    # Lets composite operators run on symbolic sizes. Without it, new nodes of such would have no shapes.
    "enable_python_dispatcher",
    # The mode that writes nodes while a model is traced; None at other times. Without it, no layer would be replayed.
    "get_proxy_mode",
    # Makes nodes of what Python computes of sizes only where they are used. Without it, layers would differ by nodes.
    "maybe_enable_thunkify",
]


def is_of_functions(error: BaseException | None) -> bool:
    """Whether Dynamo could not look into the functions that an operator takes, as torch.cond does.

    It looks at torch function modes then, too. Without this, no such model would be a graph.
    """
    dynamo = sys.modules.get("torch._dynamo.exc")
    return dynamo is not None and isinstance(error, dynamo.UncapturedHigherOrderOpError)


def real(tensor: Tensor) -> Tensor:
    """A tensor without values, in the form of one that only a tracer sees, to trace aside with; any other as it is.

    Without it, nothing could be captured of a model that torch.export traces, whose parameters are fake meanwhile.
    """
    if not isinstance(tensor, (FakeTensor, FunctionalTensor)):
        return tensor
    sizes, strides = ([_as_traced(size) for size in numbers] for numbers in (tensor.shape, tensor.stride()))
    made = torch.empty_strided(sizes, strides, dtype=tensor.dtype, device=tensor.device)
    return made.requires_grad_(tensor.requires_grad)


def _as_traced(size: int | torch.SymInt) -> int:
    """A size in the call that is traced; an open one that no input has is taken for one that is neither 0 nor 1."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else 7


@contextlib.contextmanager
def outside_recorders() -> Iterator[None]:
    """Without any mode that records operators, and able to export while torch.export runs.

    Most of what recorders switch on is a thread's own, but not all of it. Without it, nothing could be captured while
    torch.export records an adapted model; of one that shares modules, it has all modules give stand-ins for others.
    """
    from torch.export import _trace as export_trace  # imports Dynamo, which takes seconds

    names = ("_EXPORT_FLAGS", "_EXPORT_MODULE_HIERARCHY")
    state: dict[str, Any] = vars(export_trace)  # type: ignore[assignment]
    before = {name: state[name] for name in names}
    watched = nn.Module.__getattr__, nn.Module.__call__
    nn.Module.__getattr__, nn.Module.__call__ = _orig_module_getattr, _orig_module_call  # type: ignore[method-assign]
    try:
        with _disable_current_modes():
            yield
    finally:
        nn.Module.__getattr__, nn.Module.__call__ = watched  # type: ignore[method-assign]
        state.update(before)


# An integer argument for which torch.export may leave a graph open. Without it, each number would get its own graph.
IntWrapper = _IntWrapper


def values_of_symbols(shape_env: Any) -> Mapping[Any, Any]:
    """What symbolic sizes were when a graph was made. Without it, `restore_causal` could not try a mask at others.

    `var_to_val` is its name in torch 2.11.
    """
    return shape_env.backed_var_to_val if hasattr(shape_env, "backed_var_to_val") else shape_env.var_to_val


class _SharingSymbols(ShapeEnv):
    """Makes one symbol for all numbers of one part, where torch makes one for each number."""

    def __init__(self, parts: Mapping[Number, Hashable]):
        super().__init__(tracked_fakes=[], trace_asserts=True)
        self.parts, self.made = parts, dict[Hashable, Any]()

    def create_symbol(self, val: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        of_tensor = getattr(source, "prop", None)
        number = (source.base.name, of_tensor.method_name(), source.idx) if of_tensor else (source.name, "", None)
        part = self.parts.get(number)
        if part is None:
            return super().create_symbol(val, source, *args, **kwargs)
        if part not in self.made:
            self.made[part] = super().create_symbol(val, source, *args, **kwargs)
        elif (made := self.made[part]) in self.var_to_sources:  # as torch does for equal sizes, where it may share
            self.source_to_var[source.name] = made
            self.var_to_sources[made].append(source)
        return self.made[part]


class _SharingFakes(FakeTensorMode):
    """Makes the fake tensor of an input like that of another one whose sizes are the same symbols.

    Torch asks symbols some sixty questions to make one, among them whether its sizes and strides leave no gap.
    """

    def __init__(self, shape_env: _SharingSymbols):
        super().__init__(shape_env=shape_env, allow_non_fake_inputs=True, export=True)
        self.symbols = shape_env
        self.made: dict[Hashable, Tensor] = {}  # the memory that the first of each kind needs

    def from_tensor(self, tensor: Tensor, **given: Any) -> Any:
        kind = self._kind(tensor, **given)
        if kind not in self.made:
            first = super().from_tensor(tensor, **given)
            if kind is not None:
                self.made[kind] = meta_like(first)
            return first
        # As torch does for any tensor: it notes where sizes are found, and which fake tensor this one has.
        self.symbols._produce_dyn_sizes_from_int_tuple(tensor.shape, given["source"], given["symbolic_context"])
        with no_dispatch():
            memory = torch._lazy_clone(self.made[kind])  # inputs that share memory are refused in places
        fake = fake_tensor(self, memory, tensor.device, False)
        self.fake_tensor_converter.set_tensor_memo(tensor, fake)  # type: ignore[arg-type]
        return fake

    def _kind(self, tensor: Tensor, source: Any = None, symbolic_context: Any = None, **others: Any) -> Hashable:
        """What inputs have in common of which one fake tensor is like another; None for an input that has no like."""
        if source is None or symbolic_context is None or others or not _is_plain(tensor):
            return None
        if self.fake_tensor_converter._get_memo(tensor) is not None:
            return None
        parts = [self.symbols.parts.get((source.name, "size", i)) for i in range(tensor.ndim)]
        dims = symbolic_context.dynamic_sizes
        if any(part is None and dim is not DimDynamic.STATIC for part, dim in zip(parts, dims)):
            return None  # it has a symbol of its own
        return *parts, tuple(tensor.shape), tensor.dtype, tensor.device, repr(symbolic_context)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is nothing but numbers one after the other in memory of its own."""
    strides = [*itertools.accumulate(reversed(tensor.shape[1:]), operator.mul, initial=1)][::-1]
    own = type(tensor) is Tensor and tensor.layout is torch.strided and tensor._base is None
    plain = own and not (tensor.requires_grad or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized)
    return plain and list(tensor.stride()) == strides[: tensor.ndim] and not tensor.storage_offset()


@contextlib.contextmanager
def sharing_symbols(parts: Mapping[Number, Hashable]) -> Iterator[None]:
    """Let torch.export, called here, make one symbol for all numbers of one part; the graph then asks for equal ones.

    Without it, each layer of a cache would have sizes of its own: no layer would be like another, and torch would spend
    more on these sizes than on a layer.
    """
    if not parts:
        yield
        return
    with functorch_config.patch(fake_tensor_allow_unsafe_data_ptr_access=False):  # as torch.export has it
        mode = _SharingFakes(_SharingSymbols(parts))
    with tracing(TracingContext(mode)):
        yield


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Have the fake tensors of torch.export, called here, compute what an operator gives each time, and note nothing.

    Symbolic sizes belong to one capture, whose equal layers are traced once: little is asked for twice. Without it,
    noting answers would take a fifth of a capture.
    """
    from torch._dynamo import config  # a mode of fake tensors imports it, too

    with config.patch(fake_tensor_cache_enabled=False):
        yield


@contextlib.contextmanager
def ranges_remembered() -> Iterator[None]:
    """Let torch.export, called here, remember what two ranges of sizes have in common.

    Without it, that is worked out anew for each size of each tensor: 640 times for a cache of 80 layers, which has a
    handful of ranges, and takes as long as tracing seven of its layers.
    """
    theirs = ValueRanges.__and__
    ValueRanges.__and__ = functools.cache(theirs)  # type: ignore[method-assign]
    try:
        yield
    finally:
        ValueRanges.__and__ = theirs  # type: ignore[method-assign]


def known_equal(mode: FakeTensorMode) -> Mapping[Any, Any]:
    """What torch has found symbols to be equal to so far. Without it, layers would differ by the names of a size."""
    return mode.shape_env.replacements if mode.shape_env else {}


def let_go(gm: GraphModule) -> None:
    """Have what knows a captured graph's symbolic sizes die with the graph: torch keeps it in two ways.

    It knows the fake arguments, for guards, and these have sizes that know it, in C++, where no garbage is collected.
    And its methods remember, for the process, what they were asked. Without this, each capture would stay for ever.
    """
    values = (node.meta.get("val") for node in gm.graph.find_nodes(op="placeholder"))
    mode = detect_fake_mode([value for value in values if isinstance(value, Tensor)])
    if mode is not None and mode.shape_env is not None:
        mode.shape_env.tracked_fakes = []
    for method in vars(ShapeEnv).values():
        if hasattr(method, "cache_clear"):
            method.cache_clear()


# --- fake tensors that stand in for others ---------------------------------------------------------------------------


# On a mode that makes fake tensors: what these have, by device, and their memory, by sizes, strides and dtype.
_ATTRIBUTES, _MEMORY = "_lorafx_attributes", "_lorafx_memory"


def meta_like(tensor: Tensor) -> Tensor:
    """The memory that a fake tensor like this one needs: it says its size and strides, and has no bytes.

    Where sizes are symbols, a clone of what was made before takes a fortieth of the time.
    """
    sizes = (*tensor.shape, *tensor.stride())
    with no_dispatch():  # or a fake tensor would come out, of the mode that is on
        if not isinstance(tensor, FakeTensor):
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        kept: dict[Hashable, Tensor] = vars(tensor.fake_mode).setdefault(_MEMORY, {})
        key = tuple([size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes]), tensor.dtype
        if key not in kept:
            kept[key] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return torch._lazy_clone(kept[key])


def fake_tensor(mode: FakeTensorMode, like: Tensor, device: torch.device, requires_grad: bool) -> Tensor:
    """A fake tensor over `meta_like` memory. Without it, a layer's answers could not be given to another layer.

    What it is besides memory is the same for all of a device; to make it anew would take four times as long.
    """
    kept: dict[torch.device, dict[str, Any]] = vars(mode).setdefault(_ATTRIBUTES, {})
    with no_dispatch():
        if device not in kept:
            kept[device] = vars(FakeTensor(mode, like, device)).copy()
        tensor = Tensor._make_subclass(FakeTensor, like, False, dispatch_device=True, device_for_backend_keys=device)  # type: ignore[call-arg]
        if mode._allow_unsafe_data_ptr_access:
            torch._C._set_warn_deprecated_on_mutable_data_ptr(tensor)
        else:
            torch._C._set_throw_on_mutable_data_ptr(tensor)
        vars(tensor).update(kept[device])
        tensor.__init__()  # type: ignore[misc]
        return tensor.requires_grad_() if requires_grad else tensor


def pass_for_parameter(tensor: Tensor) -> None:
    """Let `isinstance(tensor, nn.Parameter)` hold. Without it, models that ask would not see hidden parameters."""
    tensor._is_param = True  # type: ignore[attr-defined]


class _Result(torch.autograd.Function):
    """Makes a tensor the result of an operator on another one, in place."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, real: Tensor) -> Tensor:
        ctx.mark_dirty(tensor)
        return tensor


def replace_by(mine: Tensor, real: Tensor, tracer: Any) -> None:
    """Let a fake tensor count as another that was traced: the same node, known value and need of gradients.

    Without it, a layer that turns out to differ could not be traced after all: Python holds the first tensor.
    """
    set_proxy_slot(mine, tracer, get_proxy_slot(real, tracer))
    mine.constant = real.constant  # type: ignore[attr-defined]
    if mine.requires_grad:  # a leaf must not be written to in place, an operator's result may
        with DisableTorchFunction(), disable_proxy_modes_tracing():
            _Result.apply(mine.requires_grad_(False), real)


# --- nodes of tensors ------------------------------------------------------------------------------------------------
# While a model is traced, each tensor has a slot that says which node computes it. Without these functions, no node
# could stand for a whole layer, or for a parameter that is hidden: repeated layers would all be traced.


def slot_of(tensor: Tensor, tracer: Any) -> Any:
    """A tensor's slot, whose `proxy` is that of its node; None if the graph has no node for it."""
    return get_proxy_slot(tensor, tracer, None)


def node_of(tensor: Tensor, tracer: Any) -> Node | None:
    """The node that computes a tensor, if the graph has one."""
    slot = get_proxy_slot(tensor, tracer, None)
    return None if slot is None else slot.proxy.node


def set_slot(tensor: Tensor, tracer: Any, slot: Any) -> None:
    """Let a tensor have this slot, which it had before."""
    set_proxy_slot(tensor, tracer, slot)


def set_node(tensor: Tensor, tracer: Any, proxy: Proxy) -> None:
    """Let the node of a proxy be what computes a tensor."""
    set_proxy_slot(tensor, tracer, _ProxyTensor(proxy, None))


@contextlib.contextmanager
def within_modules(tracer: Any, stack: Any) -> Iterator[None]:
    """Nodes that are made here say that they are in these modules. Without it, layers traced late would be nowhere."""
    before, tracer.module_stack = tracer.module_stack, stack
    try:
        yield
    finally:
        tracer.module_stack = before


def module_stack_of(tracer: Any) -> Any:
    """The modules that run now, as export notes them in each node when it calls a module (and not its forward)."""
    return tracer.module_stack.copy()


@contextlib.contextmanager
def without_stack_traces(tracer: Any) -> Iterator[None]:
    """Nodes that are made here get no line of the model. Without it, marks of layers would have one of lorafx."""
    before, tracer.record_stack_traces = tracer.record_stack_traces, False
    try:
        yield
    finally:
        tracer.record_stack_traces = before


def declare(is_so: bool) -> None:
    """Have a condition on sizes hold in the graph that is being captured: sizes that are equal become one symbol."""
    torch._check(is_so)
