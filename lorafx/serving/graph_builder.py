"""Graph builder: makes a program's graph. A call is captured, the pipeline rewrites the graph, and it is lowered."""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable
from dataclasses import replace

from torch.fx import GraphModule

from ..capture.contexts import collecting_later
from ..capture.export import trace_part
from ..capture.loops import Loops
from ..graph.modules import accepts
from ..lowering.backend import Backend
from ..lowering.lower import Lowering
from ..pipeline import Observer, Pipeline
from ..progress import announced
from ..tree.attached import trained_paths
from ..tree.hooks import RUNNING
from .call_key import Call, CallKey
from .programs import Program, ProgramCache
from .rebinding import Rewritten, rebound

# One for the process: while torch.export runs, it changes how modules are called in every thread. So captures wait for
# each other, and a kept graph for a capture, before it starts.
CAPTURING = threading.RLock()


class GraphBuilder:
    """Builds the graphs of one adapted model by its pipeline, watched by observers, and keeps what they can share.

    `captures` are graphs as captured, by their key without adapters: calls that differ in adapters alone are captured
    once. `rewritten` are graphs after the passes, by their key without adapters: calls that differ in the adapters'
    names alone are rewritten once. `lowering` keeps what was compiled, `loops` what cannot be captured for its loops.
    """

    def __init__(self, pipeline: Pipeline, backend: Backend, observers: tuple[Observer, ...] = ()) -> None:
        self.pipeline, self.observers = pipeline, observers
        self.captures: ProgramCache[GraphModule] = ProgramCache()
        self.rewritten: ProgramCache[Rewritten] = ProgramCache()
        self.lowering = Lowering(backend)
        self.loops = Loops()

    def build(self, program: Program, call: Call, unroll: bool) -> None:
        """Give a program its graph. Raises `CaptureError` if there is no graph of such a call.

        A loop over a size is repeated as often as in this call where `unroll`; else it is a `CaptureError`.
        """
        with announced(f"capturing {program.title}"), collecting_later():
            start = time.perf_counter()
            context = replace(call.context, trained=trained_paths(call.tree))
            if found := self.like(program.key, call):
                gm = rebound(found.gm, call.tree, found.context, context)
                program.seconds = time.perf_counter() - start
            else:
                program.captured = self._captured(program, call, unroll)
                gm = program.to_rewrite(call.tree)
                program.seconds = time.perf_counter() - start
                steps = self.pipeline.run(gm, context, self.observers)
                found = Rewritten(gm, context, _forms(call), steps, program.captured)
                if not context.merged:
                    self.rewritten.keep((_without_adapters(program.key), program.positional), found)
            program.steps, program.gm, program.lowered = found.steps, gm, self.lowering.lower(gm)
            program.captured, program.context = found.captured, context

    def forget(self, adapter: str) -> None:
        """Forget the graphs that were rewritten for an adapter, which is deleted; what was captured has none."""
        for found in [each for each in self.rewritten if any(a.name == adapter for a in each.context.adapters)]:
            self.rewritten.forget(found)

    def like(self, key: CallKey, call: Call) -> Rewritten | None:
        """The graph of a call that differs from this one in the adapters' names alone, if there is one."""
        kept = [] if call.context.merged else self.rewritten.of((_without_adapters(key), len(call.args)))
        if not kept:
            return None
        context, forms = replace(call.context, trained=trained_paths(call.tree)), _forms(call)
        fitting = (each for each in kept if each.serves(context, forms) and accepts(each.gm, call.args, call.kwargs))
        return next(fitting, None)

    def _captured(self, program: Program, call: Call, unroll: bool) -> GraphModule:
        key = _without_adapters(program.key)._replace(full=()), program.positional
        for gm in self.captures.of(key):
            if accepts(gm, call.args, call.kwargs):
                return gm
        outer, RUNNING.captured = RUNNING.captured, call.tree
        try:
            loops = None if unroll else self.loops
            blocks = any("blocks" in each.establishes for each in self.pipeline)  # traced once, since they are one
            gm = trace_part(call.tree, call.path, call.args, call.kwargs, program.free, loops, blocks)
        finally:
            RUNNING.captured = outer
        self.captures.keep(key, gm)
        return gm


def _without_adapters(key: CallKey) -> CallKey:
    return key._replace(adapters=(), merged=frozenset())


def _forms(call: Call) -> tuple[Hashable, ...]:
    return tuple(adapter.form(call.tree) for adapter in call.context.adapters)
