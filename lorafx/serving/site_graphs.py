"""Site graphs: the operators that read an adapted tensor, each captured, rewritten and kept as a graph by itself."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

from torch.fx import GraphModule

from ..pipeline import Context, Observer, Pipeline
from ..tree.attached import trained_paths
from .graph_builder import CAPTURING
from .programs import GuardFailed, ProgramCache, guarded

CAPACITY = 65_536  # these graphs are small, and a large model by sites has thousands


class SiteGraphs:
    """The graphs of single operators of one adapted model, by what they were specialised on."""

    def __init__(self) -> None:
        self._kept: ProgramCache[GraphModule] = ProgramCache(CAPACITY)

    def __len__(self) -> int:
        return len(self._kept)

    def run(
        self,
        key: Hashable,
        inputs: Sequence[Any],
        capture: Callable[[], tuple[GraphModule, Context]],
        pipeline: Pipeline,
        observers: tuple[Observer, ...],
    ) -> Any:
        """Run the graph that is kept for a key and fits the inputs; else that of `capture()`, rewritten.

        `capture` gives the graph and the adapters that concern it.
        """
        for gm in self._kept.of(key):
            try:
                return guarded(gm, inputs)
            except GuardFailed:
                continue
        with CAPTURING:
            gm, context = capture()
            pipeline.run(gm, replace(context, trained=trained_paths(gm)), observers)
            self._kept.keep(key, gm)
        return guarded(gm, inputs)
