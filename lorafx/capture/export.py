"""Capture: one call of a model becomes an FX graph of ATen ops, read-through to the live module tree."""

from __future__ import annotations

import contextlib
import gc
import inspect
import io
import logging
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from inspect import Parameter, Signature
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.export import Dim, ShapesCollection
from torch.export.dynamic_shapes import _IntWrapper
from torch.fx import GraphModule
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.utils import _pytree as pytree

from ..errors import CaptureError
from ..graph.blocks import repeated_modules
from ..graph.modules import rooted
from ..graph.printing import printable
from ..tree.attached import branch
from ..tree.lookup import tensor_at
from ..tree.mirror import isolated, mirrored, without_hooks
from .arguments import changed, contents, given, rebuilt, without_given
from .caches import branchless_windows, register_caches
from .purity import innermost_line, no_unrolling, pure, unchanging
from .repeated.folding import fold
from .repeated.parameters import read_parameters
from .repeated.recorder import Interrupted, Once

FILLS = "fills"  # in a graph module's meta: whether it fills its arguments


def images(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The arguments that are images or videos, (…, 3, height, width).

    A graph is specialised on their height and width: models compute with those in Python (windows, patches, positions),
    and capturing all of that symbolically takes minutes.
    """
    given = (*args, *kwargs.values())
    return [x for x in given if isinstance(x, Tensor) and x.ndim > 3 and x.shape[-3] == 3 and x.is_floating_point()]


def trace(model: nn.Module, *args: Any, **kwargs: Any) -> GraphModule:
    """Capture the call `model(*args, **kwargs)` as a graph of ATen operators.

    The model runs once on fake tensors in its present mode (train or eval), through `torch.export` with every size
    dynamic that is not 1; it may be on the `meta` device. The graph is called like the model, keeps parameter names,
    and reads parameters and buffers from the model itself, at call time. Where the call fills or returns a container
    that it was given, such as a cache, the graph leaves that alone and gives `(output, {argument: filled container})`.

    Raises `CaptureError` with torch's reason and the model's own line when the call cannot be captured, or does
    something that a graph would not do again: print, draw random numbers outside torch, change the model.
    """
    register_caches(model)
    return printable(trace_part(model, "", args, kwargs))


def trace_part(
    model: nn.Module,
    path: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    free: Collection[int] = (),
    unroll: bool = True,
    once: bool = False,
) -> GraphModule:
    """Capture a call of the module at `path` below `model`, as a graph over the whole model.

    `free` numbers the call's leaves that are integers for which the graph should not be specialised. A loop over a size
    is repeated as often as this call does, or with `unroll=False` it is a `CaptureError`. With `once`, layers that ask
    for the same operators are traced once, and the graph comes with blocks.
    """
    if once and repeated_modules(model.get_submodule(path)):
        try:
            return _trace_part(model, path, args, kwargs, free, unroll, once=True)
        except (Interrupted, CaptureError):  # operators that take functions are not traced under modes like ours
            pass
    return _trace_part(model, path, args, kwargs, free, unroll)


def _trace_part(
    model: nn.Module,
    path: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    free: Collection[int],
    unroll: bool,
    once: bool = False,
) -> GraphModule:
    bare = isolated(mirrored(model))
    part = bare.get_submodule(path)
    without_hooks(part)
    watch = Once(bare, path) if once else None
    # A part is called rather than its forward, so that the graph's nodes know that they are in it.
    function = part if path else part.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        shown = watch.called() if watch else contextlib.nullcontext()
        with shown, unchanging(part), contextlib.nullcontext() if unroll else no_unrolling(part):
            return function(*args, **kwargs)

    called = _as_called(call, part.forward, args, kwargs)
    bare.__dict__["forward"] = called
    exported = _export(bare, args, kwargs, free)
    read_parameters(exported)
    gm = rooted(exported, model)
    if watch:
        fold(gm)
    gm.meta[FILLS] = called.fills  # type: ignore[attr-defined]
    return gm


def trace_operator(
    tree: nn.Module,
    part: str,
    function: Callable[..., Any],
    leaves: Sequence[Any],
    spec: pytree.TreeSpec,
    paths: Sequence[str | None],
    owners: Iterable[str],
) -> GraphModule:
    """Capture one call of a torch function, made in the module at `part`, as a graph over the modules at `owners`.

    `leaves` and `spec` are the call's arguments, flat. A leaf that has a path is a tensor of the tree and is read from
    there; the other tensors are the graph's inputs, in order.
    """
    live = branch(tree, owners)
    bare = isolated(mirrored(live))

    def call(*inputs: Tensor) -> Any:
        given = iter(inputs)
        filled = [
            tensor_at(bare, path) if path else next(given) if isinstance(leaf, Tensor) else leaf
            for leaf, path in zip(leaves, paths)
        ]
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return function(*args, **kwargs)

    inputs = tuple(leaf for leaf, path in zip(leaves, paths) if path is None and isinstance(leaf, Tensor))
    bare.__dict__["forward"] = _as_called(call, call, inputs, {})
    gm = rooted(_export(bare, inputs, {}), live)
    for node in gm.graph.nodes:
        node.meta["nn_module_stack"] = {part: (part, type(tree.get_submodule(part)))}
    return gm


def _as_called(
    function: Callable[..., Any], forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[..., Any]:
    """`function` with a signature of just this call's arguments, named as `forward` has them, for torch.export.

    Containers are rebuilt before the model gets them: a cache that it fills must not change under export's hands. Those
    it has filled are returned along with the output, and `fills` says so afterwards.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = rebuilt(args, kwargs)
        containers = given(args, kwargs)
        before = contents(containers)
        output = function(*args, **kwargs)
        own, filled = without_given(output, containers), changed(containers, before)
        call.fills = bool(filled) or own is not output  # type: ignore[attr-defined]
        return (own, filled) if call.fills else output  # type: ignore[attr-defined]

    names = argument_names(forward, args)
    positional = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    keywords = [Parameter(name, Parameter.KEYWORD_ONLY) for name in kwargs]
    call.__signature__ = Signature(positional + keywords)  # type: ignore[attr-defined]
    return call


def argument_names(forward: Callable[..., Any], args: tuple[Any, ...]) -> list[str]:
    """What the model calls its positional arguments; those of a `*args` are numbered."""
    parameters = inspect.signature(forward).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [named[i] if i < len(named) else f"arg_{i}" for i in range(len(args))]


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], free: Collection[int] = ()) -> GraphModule:
    # Clones: one tensor passed twice would be captured as one input.
    args, kwargs = pytree.tree_map_only(Tensor, _example, (args, kwargs))
    shapes = ShapesCollection()
    fixed = {id(value) for value in images(args, kwargs)}
    leaves, spec = pytree.tree_flatten((args, kwargs))
    leaves = [_IntWrapper(leaf) if number in free else leaf for number, leaf in enumerate(leaves)]
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    for leaf in leaves:
        if isinstance(leaf, _IntWrapper):
            shapes[leaf] = Dim.AUTO
        if isinstance(leaf, Tensor):
            dims = list(enumerate(leaf.shape))[: -2 if id(leaf) in fixed else None]
            shapes[leaf] = {i: Dim.AUTO for i, size in dims if size > 1}
    name = type(model).__name__
    try:
        with _as_outside(), plain_operators(), branchless_windows(), quiet(), pure(), _use_lazy_graph_module(True):
            exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)  # type: ignore[arg-type]
            return exported.module()
    except Interrupted:
        raise
    except CaptureError as error:
        raise CaptureError(f"{name} could not be captured: {error}") from error
    except Exception as error:
        raise CaptureError(f"{name} could not be captured: {_reason(error)}{innermost_line(error)}") from error


@contextlib.contextmanager
def _as_outside() -> Iterator[None]:
    """The caller's gradient mode, but no inference mode, torch.func transform or checkpointed region around tracing."""
    grad = torch.is_grad_enabled()
    hooks: Any = contextlib.nullcontext()
    if torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with temporarily_clear_interpreter_stack(), torch.inference_mode(False), torch.set_grad_enabled(grad), hooks:
        yield


@contextlib.contextmanager
def collecting_later() -> Iterator[None]:
    """Keep Python from looking for garbage: graphs are large, and hardly any of what tracing makes is in cycles."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from logging and printing the pages that it does before it raises: the reason is in the error."""
    logger, printed = logging.getLogger("torch"), io.StringIO()
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(printed):
            yield
    finally:
        logger.setLevel(before)
    sys.stderr.write(printed.getvalue())


@contextlib.contextmanager
def plain_operators() -> Iterator[None]:
    """Keep torch.nn's fused inference kernels away: they read many weights at once, where no adapter can act."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _example(tensor: Tensor) -> Tensor:
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        with temporarily_clear_interpreter_stack():
            return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _reason(error: Exception) -> str:
    """What torch says, without its advice on how to debug torch."""
    lines = str(error).split("For more information")[0].split("The error above")[0].splitlines()
    return f"{type(error).__name__}: " + "\n".join([line for line in lines if line.strip()][:6])


def describe_call(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """A call in a line, for reports: `train, input_ids[2, 7], labels[2, 7]`."""
    named = {**dict(zip(argument_names(model.forward, args), args)), **kwargs}
    shown = [f"{name}{_brief(value)}" for name, value in named.items() if value is not None]
    return ", ".join(("train" if model.training else "eval", *shown))


def _brief(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(list(value.shape))
    holds_tensors = any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
    return f"={type(value).__name__}" if holds_tensors else f"={value!r}"
