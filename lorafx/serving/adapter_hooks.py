"""Adapter hooks: somebody's hooks on the modules that hold an adapter's tensors, as `q_proj.lora_A.default`.

Graphs read these tensors and call no module. While such a module is hooked, the graph of its site is left unfused, and
the operator that reads the module's tensors is called as the module's forward, so that torch runs all that is hooked:

x, A -> operator -> y        ->        x -> module, whose forward is the operator with A -> y

A module that an adapter has a copy of (`modules_to_save`) runs its own Python; the copy is called around it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ..adapters.adapter import SAVED, Adapter
from ..errors import warn
from ..pipeline import Pipeline

_CAST = torch.ops.aten.to.dtype
_calling = threading.RLock()  # a module has one forward at a time; its own hooks may call it again


def unfused(pipeline: Pipeline) -> Pipeline:
    """A pipeline as far as to where the adapters' equations are written out."""
    ends = [n for n, each in enumerate(pipeline, 1) if each.establishes & {"sites", "adapters", "merged"}]
    return pipeline[: max(ends, default=0)]


def call_modules(gm: GraphModule, paths: Iterable[str]) -> None:
    """Have a site's unfused graph call the modules at `paths`; warns of one that stands for no operator."""
    for path in paths:
        nodes = list(dict.fromkeys(_readers(gm, path)))
        if not all(map(_has_input, nodes)):
            warn(f"hooks on {path} do not run: the adapter's equation does not call it as a module")
            continue
        for node in nodes:
            with gm.graph.inserting_before(node):
                module = gm.graph.get_attr(path)
            node.args, node.target = (module, node.target, *node.args), call_as_module  # type: ignore[arg-type]


def call_as_module(module: nn.Module, operator: Callable[..., Any], x: Any, *rest: Any, **kwargs: Any) -> Any:
    """`operator(x, *rest)`, called as the forward of a module with one argument, and thus with the module's hooks."""
    return call_with_hooks(module, lambda x: operator(x, *rest, **kwargs), x)


def call_with_hooks(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a module that has no forward of its own as though this were it."""
    with _calling:
        before = vars(module).get("forward")
        vars(module)["forward"] = forward
        try:
            return module(*args, **kwargs)
        finally:
            vars(module).pop("forward")
            if before is not None:
                vars(module)["forward"] = before


def hooked_copy(adapters: Iterable[Adapter], hooked: Iterable[str], path: str) -> str | None:
    """The path of the hooked module that holds an adapter's own copy of the module at `path`; None if there is none."""
    copies = {f"{path}.{SAVED}.{adapter.name}" for adapter in adapters}
    return next((each for each in hooked if each in copies), None)


def _readers(gm: GraphModule, path: str) -> Iterator[Node]:
    """The operators that read a tensor of the module at `path`, cast or not."""
    for read in gm.graph.find_nodes(op="get_attr"):
        if str(read.target).rpartition(".")[0] == path:
            for user in read.users:
                yield from user.users if user.target is _CAST else (user,)


def _has_input(node: Node) -> bool:
    """Whether an operator's first argument is computed, and no tensor of the tree."""
    x = node.args[0] if node.args else None
    while isinstance(x, Node) and x.target is _CAST:
        x = x.args[0]
    return node.op == "call_function" and isinstance(x, Node) and x.op != "get_attr"
