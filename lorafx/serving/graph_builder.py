"""Graph builder: makes a program's graph. A call is captured, the pipeline rewrites the graph, and it is lowered."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

from torch.fx import GraphModule

from ..capture.contexts import collecting_later
from ..capture.export import trace_part
from ..graph.masks.sizes import ONES
from ..graph.modules import accepts, copied
from ..lowering.backend import Backend
from ..lowering.lower import Lowering
from ..pipeline import Observer, Pipeline
from ..tree.attached import trained_paths
from .call_key import Call
from .programs import Program, ProgramCache

# One for the process: while torch.export runs, it changes how modules are called in every thread. So captures wait for
# each other, and a kept graph for a capture, before it starts.
CAPTURING = threading.RLock()


class GraphBuilder:
    """Builds the graphs of one adapted model, and keeps what they can share.

    `captures` are graphs as captured, by their key without adapters: calls that differ in adapters alone are captured
    once. `lowering` keeps what was compiled.
    """

    def __init__(self, backend: Backend) -> None:
        self.captures: ProgramCache[GraphModule] = ProgramCache()
        self.lowering = Lowering(backend)

    def build(
        self, program: Program, call: Call, pipeline: Pipeline, observers: tuple[Observer, ...], unroll: bool
    ) -> None:
        """Give a program its graph. Raises `CaptureError` if there is no graph of such a call.

        A loop over a size is repeated as often as in this call where `unroll`; else it is a `CaptureError`.
        """
        with collecting_later():
            start = time.perf_counter()
            gm = copied(self._captured(program, call, unroll, _makes_blocks(pipeline)), call.tree)
            for node, name in zip(gm.graph.find_nodes(op="placeholder"), program.names):
                node.meta[ONES] = name in program.key.full
            program.seconds = time.perf_counter() - start
            program.steps = pipeline.run(gm, replace(call.context, trained=trained_paths(call.tree)), observers)
            program.gm, program.lowered = gm, self.lowering.lower(gm)

    def _captured(self, program: Program, call: Call, unroll: bool, blocks: bool) -> GraphModule:
        key = program.key._replace(adapters=(), merged=frozenset(), full=())
        for gm in self.captures.of(key):
            if accepts(gm, call.args, call.kwargs):
                return gm
        gm = trace_part(call.tree, call.path, call.args, call.kwargs, program.free, unroll, blocks)
        self.captures.keep(key, gm)
        return gm


def _makes_blocks(pipeline: Pipeline) -> bool:
    """Whether layers that repeat become blocks anyway, so that capture may trace them once."""
    return any("blocks" in each.establishes for each in pipeline)
