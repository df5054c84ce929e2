"""Capture one call as a graph: of a model, of a module in it, or of a torch function that reads a weight.

A graph reads parameters and buffers where the model has them, whenever it runs; it has no copies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Sequence
from inspect import Parameter, Signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ShapesCollection
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from ..adapters.by_row import ROWS, first_tensor
from ..adapters.storages import keep_own_layers, own_layers, prepare_base
from ..errors import CaptureError
from ..graph.blocks import repeated_modules
from ..graph.modules import rooted, taken_names
from ..graph.printing import printable
from ..torch_private.graphs import use_lazy_graph_module
from ..torch_private.guards import conditions_written_at_once
from ..torch_private.hidden_states import record_as_asked
from ..torch_private.tensors import is_wrapped, list_own_weights
from ..torch_private.tracing import (
    IntWrapper,
    declare,
    is_of_functions,
    let_go,
    ranges_remembered,
    real,
    sharing_symbols,
    uncached,
)
from ..tree.attached import branch
from ..tree.lookup import tensor_at
from ..tree.mirror import OWN, isolated, mirrored, without_hooks
from ..tree.own_layers import own_forward_of, show_own_layers
from .arguments import argument_names, images
from .autograd_use import AutogradUse, no_own_backward
from .caches import branchless_windows, parts, register_caches
from .contexts import collecting_later, outside_transforms, plain_operators, quiet, without_global_hooks
from .foreign_tensors import ForeignTensors, require_no_foreign
from .frames import line_of
from .layout_use import CONTIGUOUS, LayoutUse, all_contiguous
from .loops import Looping, Loops
from .outside_use import OutsideUse
from .process_use import ENVIRONMENT, EnvironmentUse, no_question_of_inference
from .purity import Changed, ForGood, pure, unchanging
from .repeated.folding import fold
from .repeated.hidden_parameters import read_parameters
from .repeated.layers import RepeatedLayers
from .repeated.record import Interrupted
from .written_arguments import changed, contents, given, rebuilt, without_given

FILLS = "fills"  # in a graph module's meta: whether its output is followed by arguments that it has filled


def trace(model: nn.Module, *args: Any, **kwargs: Any) -> GraphModule:
    """Capture the call `model(*args, **kwargs)` as a graph of ATen operators.

    The model runs once on fake tensors in its present mode (train or eval), through `torch.export` with every size
    dynamic that is not 1; it may be on the `meta` device. The graph is called like the model, keeps parameter names,
    and reads parameters and buffers from the model itself, at call time. Where the call fills or returns a container
    that it was given, such as a cache, the graph leaves that alone and gives `(output, {argument: filled container})`.
    A quantised layer is one operator, which runs the layer's own code. Of an adapted model it is the base's graph,
    before any pass; `lora.graph(…)` is the one that serves calls.

    Raises `CaptureError` with torch's reason and the model's own line when the call cannot be captured, or does
    something that a graph would not do again: print, draw random numbers outside torch, change the model.
    """
    register_caches(model)
    return printable(trace_part(_with_own_layers(model), "", args, kwargs))


def _with_own_layers(model: nn.Module) -> nn.Module:
    """The model; or a mirror in which quantised layers are operators, where they are not, as in one that is adapted."""
    if all(own_forward_of(module) for module in own_layers(model)):
        return model
    prepare_base(model)
    tree = mirrored(model)
    keep_own_layers(tree)
    return tree


def trace_part(
    model: nn.Module,
    path: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    free: Collection[int] = (),
    loops: Loops | None = None,
    once: bool = False,
) -> GraphModule:
    """Capture a call of the module at `path` below `model`, as a graph over the whole model.

    The graph computes with integers as with constants, but for those among the call's flat arguments whose places are
    in `free`: these are inputs. A loop over a size is written out as often as this call runs it; with `loops` it raises
    `CaptureError`, and is remembered there. With `once`, layers that run the same operators are traced once, and the
    graph has blocks.
    Raises `CaptureError` as `trace` does.
    """
    wanted = _Wanted(model, path, args, kwargs, free, loops)
    try:
        return _trace_once(wanted, once)
    except CaptureError as error:
        cause = error.__cause__
        if isinstance(cause, Changed) and record_as_asked(model.get_submodule(path), cause.names):
            return trace_part(model, path, args, kwargs, free, loops, once)  # the model has its recorders for good now
        if not isinstance(cause, ForGood):
            raise
        try:  # once more: what the model has noted in its config may be there for good, and a warning may come once
            return _trace_once(wanted, once)
        except CaptureError as again:
            if isinstance(again.__cause__, ForGood):
                again.__cause__.put_back()
            cause.put_back()
            raise


class _Wanted(NamedTuple):
    """The call to capture, as `trace_part` is asked for it."""

    model: nn.Module
    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    free: Collection[int]
    loops: Loops | None


def _trace_once(wanted: _Wanted, once: bool) -> GraphModule:
    """Capture with repeated layers traced once, if wanted and possible."""
    if once and repeated_modules(wanted.model.get_submodule(wanted.path)):
        try:
            return _trace_part(wanted, once=True)
        except Interrupted:
            pass
        except CaptureError as error:  # as for operators that take functions: torch refuses to trace them so
            if isinstance(error.__cause__, (Changed, ForGood, Looping)):
                raise
    try:
        return _trace_part(wanted)
    except CaptureError as error:
        if not is_of_functions(error.__cause__):
            raise
        gm = _trace_part(wanted, watched=False)
        require_no_foreign(gm, wanted.model)
        return gm


def _trace_part(wanted: _Wanted, once: bool = False, watched: bool = True) -> GraphModule:
    """Capture; with `watched`, what the model does besides tensor operators is looked at by torch function modes."""
    model, path, args, kwargs, free, loops = wanted
    require_free_names(model)
    bare = isolated(mirrored(model))
    show_own_layers(bare, model)
    part = _part_of(bare, model, path)
    if loops:
        loops.remember(bare)
    layers = RepeatedLayers(bare, path) if once else None
    layout, environment = LayoutUse(), EnvironmentUse()
    # The module is called, and not its forward: only then does export note in each node that it is in this module.
    function = part if path else part.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:  # function modes must leave in the reverse order, whatever happens
            stack.enter_context(collecting_later())
            stack.enter_context(layers.shown() if layers else contextlib.nullcontext())
            list_own_weights(part)
            stack.enter_context(unchanging(part))
            stack.enter_context(loops.refused(bare, part) if loops else contextlib.nullcontext())
            stack.enter_context(no_own_backward())
            stack.enter_context(environment.noted())
            looks = (ForeignTensors(model, bare), AutogradUse(), layout, no_question_of_inference(), OutsideUse())
            for look in looks if watched else ():
                stack.enter_context(look)
            _declare_sizes(kwargs.pop(ROWS, None), first_tensor((*args, *kwargs.values())))
            return function(*args, **kwargs)

    called = _as_called(call, part.forward, args, kwargs)
    bare.__dict__["forward"] = called
    if isinstance(bare, GraphModule):  # torch.export would take its code, which is of another call's form
        bare.__class__ = nn.Module  # type: ignore[assignment]
    read_parameters(exported := _export(bare, args, kwargs, free))
    gm = rooted(exported, model)
    if layers:
        fold(gm)
    gm.meta |= {FILLS: vars(called)["fills"], CONTIGUOUS: layout.asked, ENVIRONMENT: frozenset(environment.names)}
    if layout.asked and not all_contiguous(pytree.tree_leaves((args, kwargs))):
        raise CaptureError("it asks how a tensor lies in memory, and an argument is not contiguous")
    return gm


def _declare_sizes(rows: Tensor | None, first: Tensor | None) -> None:
    """Have the rows of a graph's own input, and their tokens, be those of the call; the model knows nothing of it."""
    if rows is not None:
        declare(first is not None and first.shape[0] == rows.shape[0])
        declare(rows.ndim == 1 or (first is not None and first.shape[1] == rows.shape[1]))


def _part_of(bare: nn.Module, model: nn.Module, path: str) -> nn.Module:
    """The part of a mirror that is to run, by the forward that it has of itself, and without its own hooks."""
    part = bare.get_submodule(path)
    own = vars(part).pop(OWN, None)
    if path and not getattr(vars(model.get_submodule(path)).get("forward"), "lorafx", False):  # somebody has wrapped it
        vars(part).pop("forward", None)
        vars(part).update({} if own is None else {"forward": own})
    without_hooks(part)
    return part


def require_free_names(model: nn.Module) -> None:
    """Raise `CaptureError` for a root with a child or tensor called like something of torch's GraphModule."""
    if taken := taken_names(model):
        raise CaptureError(
            f"{type(model).__name__} has a `{taken[0]}`, and so has every torch.fx.GraphModule: there can be no graph "
            "of the model as long as that is at its root"
        )


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
    show_own_layers(bare, live)

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
    with without_global_hooks():
        gm = rooted(_export(bare, inputs, {}), live)
    for node in gm.graph.nodes:
        node.meta["nn_module_stack"] = {part: (part, type(tree.get_submodule(part)))}
    return gm


def _as_called(
    function: Callable[..., Any], forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[..., Any]:
    """`function` with a signature for torch.export: just this call's arguments, by the names that `forward` has.

    The model gets its arguments in new containers, for a cache that it fills must not change while export looks at it.
    Where it has filled some, they are returned along with the output; the function's `fills` says so afterwards.
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


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], free: Collection[int] = ()) -> GraphModule:
    # With clones, since torch.export takes one tensor that is passed twice for a single input.
    args, kwargs = pytree.tree_map_only(Tensor, _example, (args, kwargs))
    shapes, alike = ShapesCollection(), parts({**dict(zip(argument_names(model.forward, args), args)), **kwargs})
    fixed = {id(value) for value in images(args, kwargs)}
    leaves, spec = pytree.tree_flatten((args, kwargs))
    leaves = [IntWrapper(leaf) if number in free else leaf for number, leaf in enumerate(leaves)]
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    for leaf in leaves:
        if isinstance(leaf, IntWrapper):
            shapes[leaf] = Dim.AUTO
        if isinstance(leaf, Tensor):
            dims = list(enumerate(leaf.shape))[: -2 if id(leaf) in fixed else None]
            shapes[leaf] = {i: Dim.AUTO for i, size in dims if size > 1}
    name = type(model).__name__
    try:
        with (
            outside_transforms(),
            plain_operators(),
            branchless_windows(),
            quiet(),
            pure(),
            use_lazy_graph_module(True),
            conditions_written_at_once(),
            uncached(),
            sharing_symbols(alike),
            ranges_remembered(),
        ):
            exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)  # type: ignore[arg-type]
            gm = exported.module()
        let_go(gm)
        return gm
    except Interrupted:
        raise
    except CaptureError as error:
        raise CaptureError(f"{name} could not be captured: {error}") from error
    except Exception as error:
        raise CaptureError(f"{name} could not be captured: {_reason(error)}{line_of(error)}") from error


def _example(tensor: Tensor) -> Tensor:
    with outside_transforms(), torch.inference_mode(False):  # or the model could not write to it while it is exported
        if is_wrapped(tensor):
            return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        tensor = real(tensor)
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _reason(error: Exception) -> str:
    """What torch says, without its advice on how to debug torch."""
    lines = str(error).split("For more information")[0].split("The error above")[0].splitlines()
    return f"{type(error).__name__}: " + "\n".join([line for line in lines if line.strip()][:6])
