"""The dispatcher: which program serves a call. Each kind of call gets one, made when such a call comes first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from ..capture.export import FILLS
from ..capture.layout_use import CONTIGUOUS, all_contiguous
from ..capture.written_arguments import fill
from ..errors import AdapterError, CaptureError, ConfigError
from ..graph.modules import accepts, refresh
from ..lowering.backend import Backend
from ..lowering.lower import Lowered
from ..pipeline import Context, Observer, Pipeline
from ..torch_private.tensors import is_within_transform
from .acting import Acting
from .before import Before, RunAgain
from .by_sites import BySites
from .call_key import Call, CallKey
from .checkpointing import without_reentrant
from .early_calls import EarlyCalls
from .free_counters import FreeCounters
from .graph_builder import CAPTURING, GraphBuilder
from .keys import Keys
from .program_maker import ProgramMaker
from .programs import GuardFailed, Program, ProgramCache, guarded
from .site_policy import SitePolicy
from .traced import is_traced, run_traced
from .tree_state import TreeGuards

CAPTURES = ("auto", "graph", "sites")


@dataclass
class Dispatcher:
    """Serves the calls of one adapted tree: key, find, run.

    `capture` is "auto" (by sites at first, then a graph of the whole call, where that can be), "graph" (from the first
    call on, and an error where that cannot be) or "sites". Who changes one of the first four fields calls `clear` then,
    for all others are made by these. Programs are never copied or pickled with the tree: a copy makes its own.
    """

    pipeline: Pipeline
    backend: Backend
    observers: tuple[Observer, ...] = ()
    capture: str = "auto"
    programs: ProgramCache[Program] = field(init=False)
    keys: Keys = field(init=False)  # what programs are kept by
    maker: ProgramMaker = field(init=False)  # of what serves a new kind of call
    graphs: GraphBuilder = field(init=False)
    by_sites: BySites = field(init=False)  # how the model's own Python runs
    sites: SitePolicy = field(init=False)  # which calls go so
    early: EarlyCalls = field(init=False)
    acting: Acting = field(init=False)

    def __post_init__(self) -> None:
        if self.capture not in CAPTURES:
            raise ConfigError(f"capture={self.capture!r} is none of {', '.join(CAPTURES)}")
        self.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("pipeline", "backend", "observers", "capture")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.clear()

    def __iter__(self) -> Iterator[Program]:
        return iter(self.programs)

    def clear(self) -> None:
        """Forget every program, and all that was learnt from calls."""
        tree, self.sites, self.acting = TreeGuards(), SitePolicy(self.capture), Acting()
        self.graphs = GraphBuilder(self.pipeline, self.backend, self.observers)
        self.by_sites = BySites(self.pipeline, self.observers, tree, self.sites)
        nobody_asks_for_graphs = self.capture == "auto" and not self.backend.is_asked_for
        self.early = EarlyCalls(nobody_asks_for_graphs and self.by_sites.runs_equations)
        self.programs, keys = ProgramCache(), Keys(tree, FreeCounters(self.graphs.loops), self.sites)
        self.maker = ProgramMaker(self.programs, keys, self.graphs, self.early, self.by_sites)
        self.keys = keys  # the last: who is given a new key must not find what an old one was kept by

    def forget(self, adapter: str) -> None:
        """Forget what was made for calls in which an adapter acts, which is deleted. What others have stays."""
        self.programs.forget_keys(lambda key: key.has(adapter))
        for each in (self.graphs, self.by_sites, self.early, self.acting):
            each.forget(adapter)
        self.sites.forget_adapter(adapter)

    def serve(self, tree: nn.Module, context: Context, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call of the module at `path` below `tree`, by a program that is kept for its key, or is made now."""
        call = Call.of(tree, context, path, args, kwargs)
        if is_traced():
            if call.context.numbers:
                raise AdapterError("a call whose rows or tokens choose adapters is not recorded: give all the same one")
            return run_traced(call, self.pipeline, self.observers, self.step_into)
        key, kept = self.find(call)
        if self.sites.is_recomputed(path):
            return self.by_sites.run(call, self.step_into, early=True)[0]
        for program in kept:
            if program.waits and self.early.is_due(key) and not is_within_transform():  # which no capture may be in
                return self.run_first(self.maker.promote(program, call), call)
            try:
                return self.run(program, call)
            except GuardFailed:  # it is a graph for other sizes
                continue
            except CaptureError:  # the next such call is given a graph, which may do what equations cannot
                if program.waits:
                    self.early.give_up(key)
                raise
        return self.run_first(self.maker.make(key, call, len(kept)), call)

    def find(self, call: Call) -> tuple[CallKey, tuple[Program, ...]]:
        """A call's key, and what is kept for it. Layers that were told anew to checkpoint do so in our way first."""
        key = self.keys.of(call)
        kept = self.programs.of(key)
        if not kept and without_reentrant(self.keys.tree.modules):
            key = self.keys.of(call)
            kept = self.programs.of(key)
        return key, kept

    def program(self, tree: nn.Module, context: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
        """What serves a call of the whole model from now on, without running it."""
        call = Call.of(tree, context, "", args, kwargs)
        key, kept = self.find(call)
        for program in kept:
            called_alike = program.gm is None or program.positional == len(args)
            if not program.waits and called_alike and (program.gm is None or accepts(program.gm, args, call.kwargs)):
                return program
        waiting = next((program for program in kept if program.waits), None)
        if waiting is not None:
            return self.maker.promote(waiting, call)
        return self.maker.make(key, call, len(kept), may_wait=False)

    # --- running a program --------------------------------------------------------------------------------------------

    def run(self, program: Program, call: Call) -> Any:
        """Run a kept program. Raises `GuardFailed` if it is a graph that does not fit the call's sizes."""
        before = self._before(program, call)
        try:
            result = self._run(program, call, before is not None)
        except RunAgain as error:
            if before is None:
                raise
            before.put_back(error)
            return self.run(program, call)
        program.hits += 1
        return result

    def run_first(self, program: Program, call: Call) -> Any:
        """Run a program with the call that it was made for."""
        before = self._before(program, call)
        try:
            return self._run(program, call, before is not None)
        except RunAgain as error:
            if before is None:
                raise
            before.put_back(error)
            return self.run_first(program, call)
        except (CaptureError, torch.OutOfMemoryError) as error:
            if before is None or not program.waits:
                raise
            before.put_back(error)  # there may be a graph, and it keeps less
            self.early.give_up(program.key)
            return self.run_first(self.maker.promote(program, call), call)
        except GuardFailed as error:
            reason = f"the graph captured from this very call does not accept it: {error}"
            self.sites.step_down(program, CaptureError(reason))
            return self._run(program, call)
        except BaseException:
            if program.gm is None:  # the call is one that the model itself refuses
                self.programs.forget(program)
                self.sites.forget(program)
            raise

    def _before(self, program: Program, call: Call) -> Before | None:
        """What a call may change, where it may have to run once more: one of the first of its kind, by sites."""
        return None if program.gm is not None or program.hits else self.by_sites.before(call, program.key)

    def _run(self, program: Program, call: Call, starts_anew: bool = False) -> Any:
        """Run a program. `starts_anew` says that whoever calls starts anew on `RunAgain`."""
        is_new = not program.hits
        if program.gm is None or program.lowered is None:
            turned = bool(call.context.numbers) and not (program.told_rows or self.early.seen(program.key))
            new = program.key if is_new else None
            result, acts = self.by_sites.run(call, self.step_into, program.waits, new, starts_anew, turned)
            program.told_rows = True
            self.sites.warn_once(program)
            self.acting.see(call, acts, result)
            if program.waits:
                self.early.count(program.key)
        else:
            if is_new:
                self.acting.see(call, program.acts)
            result = _run_graph(program.gm, program.lowered, call, program.positional)
        if is_new:
            self.acting.require_gradients(call, result)
        return result

    @property
    def step_into(self) -> Callable[..., Any]:
        """What a part does that the model's own Python calls."""
        return partial(self.sites.step_into, serve=self.serve)


def _run_graph(gm: GraphModule, lowered: Lowered, call: Call, positional: int) -> Any:
    with CAPTURING:
        refresh(gm, call.tree)
        refresh(lowered.graph, call.tree)
    if gm.meta[CONTIGUOUS] and not all_contiguous(call.leaves):
        raise GuardFailed("an argument is not contiguous")
    leaves, output = guarded(lowered.run, call.leaves), lowered.output
    return fill(leaves, output, *call.given(positional)) if gm.meta[FILLS] else output.unflatten(leaves)
