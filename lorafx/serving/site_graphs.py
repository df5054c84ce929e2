"""Site graphs: the operators that read an adapted tensor, each captured, rewritten and kept as a graph by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn
from torch.fx import GraphModule

from ..pipeline import Context, Observer, Pipeline
from ..tree.attached import trained_paths
from .adapter_hooks import call_modules, unfused
from .call_key import OperatorKey, is_of
from .graph_builder import CAPTURING
from .programs import GuardFailed, ProgramCache, guarded

CAPACITY = 65_536  # these graphs are small, and a large model by sites has thousands


class SiteGraphs:
    """The graphs of single operators of one adapted model, as its pipeline writes them, by what they depend on."""

    def __init__(self, pipeline: Pipeline, observers: tuple[Observer, ...]) -> None:
        self.pipeline, self.observers = pipeline, observers
        self._kept: ProgramCache[GraphModule] = ProgramCache(CAPACITY)

    def forget(self, adapter: str) -> None:
        """Forget the graphs in which an adapter acts, which is deleted."""
        self._kept.forget_keys(lambda key: any(is_of(adapter, each) for each in key.acting))

    def __len__(self) -> int:
        return len(self._kept)

    def run(
        self,
        key: OperatorKey,
        inputs: Sequence[Any],
        capture: Callable[[], tuple[GraphModule, Context]],
        hooked: Sequence[str],
    ) -> Any:
        """Run the graph that is kept for a key and fits the inputs; else that of `capture()`, rewritten.

        `capture` gives the graph and the adapters that concern it; `hooked` are modules of their tensors to be called.
        """
        for gm in self._kept.of(key):
            try:
                return guarded(partial(_call, gm), inputs)
            except GuardFailed:
                continue
        with CAPTURING:
            gm, context = capture()
            pipeline = unfused(self.pipeline) if hooked else self.pipeline
            pipeline.run(gm, replace(context, trained=trained_paths(gm)), self.observers)
            call_modules(gm, hooked)
            _call_directly(gm)
            self._kept.keep(key, gm)
        return guarded(partial(_call, gm), inputs)


def _call(gm: nn.Module, *inputs: Any) -> Any:
    """Run a module that is none of the model's, so that hooks around every module of the process do not see it."""
    return type(gm).forward(gm, *inputs)


def _call_directly(gm: GraphModule) -> None:
    """Have a graph run what it calls of its own modules, as its guards, by `_call`."""
    for node in gm.graph.find_nodes(op="call_module"):
        with gm.graph.inserting_before(node):
            called = gm.graph.call_function(_call, (gm.graph.get_attr(str(node.target)), *node.args), node.kwargs)
        node.replace_all_uses_with(called)
        gm.graph.erase_node(node)
    gm.recompile()
