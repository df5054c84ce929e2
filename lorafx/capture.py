"""Capture: one call of a model becomes an FX graph of ATen ops, read-through to the live module tree."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping
from inspect import Parameter, Signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ShapesCollection
from torch.fx import Graph, GraphModule
from torch.utils import _pytree as pytree

from .autocast import autocast_dtype
from .errors import CaptureError
from .rewrite import resolve
from .tree import find_tensor, mirrored, without_hooks

CAPTURED = "captured"


def trace(model: nn.Module, *args: Any, **kwargs: Any) -> GraphModule:
    """Capture the call `model(*args, **kwargs)` as a graph of ATen operators.

    The model runs once on fake tensors in its present mode (train or eval), through `torch.export` with every size
    dynamic that is not 1; it may be on the `meta` device. The graph is called like the model, keeps parameter names,
    and reads parameters and buffers from the model itself, at call time.

    Raises `CaptureError` with torch's reason when the call cannot be captured.
    """
    return trace_part(model, "", args, kwargs)


def trace_part(model: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GraphModule:
    """Capture a call of the module at `path` below `model`, as a graph over the whole model."""
    bare = mirrored(model)
    part = bare.get_submodule(path)
    without_hooks(part)
    # A part is called rather than its forward, so that the graph's nodes know that they are in it.
    bare.__dict__["forward"] = _as_called(part if path else part.forward, part.forward, args, kwargs)
    return rooted(_export(bare, args, kwargs), model)


def _as_called(
    function: Callable[..., Any], forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[..., Any]:
    """`function` with a signature of just this call's arguments, named as `forward` has them, for torch.export.

    Containers are rebuilt before the model gets them: a cache that it fills must not change under export's hands.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map(lambda leaf: leaf, (args, kwargs))
        return function(*args, **kwargs)

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


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GraphModule:
    _register_caches(model)
    # Clones: one tensor passed twice would be captured as one input.
    args, kwargs = pytree.tree_map_only(Tensor, _example, (args, kwargs))
    shapes = ShapesCollection()
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor):
            shapes[leaf] = {i: Dim.AUTO for i, size in enumerate(leaf.shape) if size > 1}
    try:
        with torch.inference_mode(False):
            exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)  # type: ignore[arg-type]
            return exported.module()
    except Exception as error:
        raise CaptureError(f"{type(model).__name__} could not be captured: {_reason(error)}") from error


def _example(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: " + "\n".join(lines[:12])


def _register_caches(model: nn.Module) -> None:
    """Let torch.export see into the key-value caches that transformers' models take and return."""
    if hasattr(model, "config") and hasattr(model, "_supports_attention_backend"):
        from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model

        register_cache_pytrees_for_model(model)  # type: ignore[arg-type]


def rooted(exported: GraphModule, tree: nn.Module) -> GraphModule:
    """The exported graph as a module over `tree`: what the tree owns is read there, the rest moves below `captured`.

    The rest is what only the graph has: lifted constants, guards, bodies of control-flow operators.
    """
    private = nn.Module()
    for node in exported.graph.nodes:
        if node.op not in ("get_attr", "call_module") or find_tensor(tree, str(node.target)) is not None:
            continue
        atom = str(node.target).replace(".", "_")
        value = resolve(exported, str(node.target))
        if isinstance(value, nn.Module):
            private.add_module(atom, value)
        else:
            private.register_buffer(atom, value, persistent=False)
        node.target = f"{CAPTURED}.{atom}"
    return over(exported.graph, tree, private)


def over(graph: Graph, tree: nn.Module, private: nn.Module) -> GraphModule:
    """A GraphModule that runs `graph` with the modules and tensors of `tree`, sharing them and copying nothing."""
    gm = GraphModule(nn.Module(), Graph(), class_name="GraphModule")
    gm.__dict__["_parameters"], gm.__dict__["_buffers"] = tree._parameters, tree._buffers
    gm.__dict__["_modules"] = {**tree._modules, CAPTURED: private}
    gm.training = tree.training
    gm.graph = graph
    return gm


def refresh(gm: GraphModule, tree: nn.Module) -> None:
    """See children that the tree has replaced since (`resize_token_embeddings` and the like)."""
    for name, child in tree._modules.items():
        if gm._modules.get(name) is not child:
            gm._modules[name] = child


def call_key(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
    """What a graph of this call is specialised on besides the tree's own state.

    Structure and constants of the arguments, dtype, device and rank of tensors, which sizes are 0 or 1, the gradient
    mode and the autocast state.
    """
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    devices = sorted({leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)} | {"cpu"})
    return repr(spec), tuple(map(_leaf_key, leaves)), torch.is_grad_enabled(), tuple(map(autocast_dtype, devices))


def _leaf_key(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return leaf.dtype, leaf.device, leaf.requires_grad, tuple(min(size, 2) for size in leaf.shape)
    try:
        hash(leaf)
    except TypeError:
        return type(leaf), repr(leaf)
    return type(leaf), leaf


def describe_call(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """A call in a line, for reports: `train, input_ids[2, 7], labels[2, 7]`."""
    named = {**dict(zip(argument_names(model.forward, args), args)), **kwargs}
    shown = [
        f"{k}{list(v.shape)}" if isinstance(v, Tensor) else f"{k}={v!r}" for k, v in named.items() if v is not None
    ]
    return ", ".join(("train" if model.training else "eval", *shown))
