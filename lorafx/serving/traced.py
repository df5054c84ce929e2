"""Traced calls: somebody else records what an adapted model does, by torch.export, torch.jit.trace or make_fx.

The model's own Python runs, as it does when a bare model is recorded, and so the result is as dynamic in sizes. At each
site the recorder sees operators of ATen alone, with the adapters' equations between them: what it has recorded runs
where there is no lorafx. The small graphs of sites are captured aside, in a thread of their own, for all that recorders
switch on is a thread's own.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule

from ..adapters.adapter import Adapter
from ..capture.export import FILLS, trace_part
from ..errors import CaptureError
from ..ops.modes import accelerator, autocast_dtype
from ..pipeline import Context, Observer, Pipeline
from ..torch_private.tracing import get_proxy_mode, outside_recorders
from ..tree.attached import branch, has_copies_among_children, trained_paths
from ..tree.lookup import tensor_at
from .call_key import Call
from .graph_builder import CAPTURING
from .interpret import interpret
from .per_site import Outside, Run, SiteInterpreter, Sites
from .site_table import SiteTable
from .tree_state import TreeGuards


def is_traced() -> bool:
    """Whether somebody records the operators that run in this thread.

    torch keeps some of its recorders for all threads, so while another one captures a graph, the answer waits for that.
    """
    if torch.jit.is_tracing() or get_proxy_mode() is None:
        return torch.jit.is_tracing()
    with CAPTURING:
        return get_proxy_mode() is not None


def run_traced(call: Call, pipeline: Pipeline, observers: tuple[Observer, ...], step_into: Run) -> Any:
    """Run a call for whoever records it. `step_into` is the interpreter's."""
    plain = pipeline.through("lean", "frozen")  # later passes write operators of lorafx

    def rewritten(capture: Callable[[], tuple[GraphModule, Context]]) -> GraphModule:
        gm, context = capture()
        plain.run(gm, replace(context, trained=trained_paths(gm)), observers)
        return gm

    def run_operator(key: Hashable, inputs: Sequence[Any], capture: Callable[[], Any], hooked: Any) -> Any:
        return aside(partial(rewritten, capture)).forward(*inputs)

    if not has_copies_among_children(call.tree.get_submodule(call.path)):
        state = aside(partial(TreeGuards().state, call.tree))
        sites = Sites(state, SiteTable.of(call.tree, call.context))
        return interpret(SiteInterpreter(call, sites, Outside(run_operator, step_into, ran=set())), call)[0]
    gm = aside(partial(rewritten, partial(_captured, call)))
    return gm.forward(*call.args, **call.kwargs)


def _captured(call: Call) -> tuple[GraphModule, Context]:
    """The graph of a part whose Python would take copies among its children for layers, and what acts within it."""
    part = call.tree.get_submodule(call.path)
    read = {id(tensor) for tensor in (*part.parameters(), *part.buffers())}

    def concerned(adapter: Adapter) -> Adapter:
        paths = [*(site.weight for site in adapter.selection), *adapter.replaced]
        here = [path for path in paths if id(tensor_at(call.tree, path)) in read]
        return adapter.restricted_to(here, here)

    adapters = tuple(a for a in map(concerned, call.context.adapters) if a.selection or a.replaced)
    owners = {call.path}.union(*(adapter.owners for adapter in adapters))
    gm = trace_part(branch(call.tree, owners), call.path, call.args, call.kwargs)
    if gm.meta[FILLS]:
        raise CaptureError(f"{call.path or 'the model'} fills what it is given, which cannot be recorded of it")
    return gm, Context(adapters, call.context.merged & {adapter.name for adapter in adapters})


def aside(function: Callable[[], Any]) -> Any:
    """What a function gives in a thread where nobody records, in the gradient mode and autocast of this one."""
    grad, devices = torch.is_grad_enabled(), ("cpu", *([] if (found := accelerator()) is None else [found]))
    dtypes = {device: autocast_dtype(device) for device in devices}
    outcome: list[Any] = []

    def run() -> None:
        try:
            with outside_recorders(), contextlib.ExitStack() as modes, torch.set_grad_enabled(grad):
                for device, dtype in dtypes.items():
                    modes.enter_context(torch.autocast(device, dtype, enabled=dtype is not None))
                outcome.append((function(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, name="lorafx-aside")
    thread.start()
    thread.join()
    result, error = outcome[0]
    if error is not None:
        raise error
    return result
