"""The dispatcher: which program serves a call. Each kind of call gets one, made when such a call comes first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn
from torch.fx import GraphModule

from ..adapters.site import Site
from ..capture.arguments import describe_call
from ..capture.export import FILLS
from ..capture.layout_use import CONTIGUOUS, all_contiguous
from ..capture.written_arguments import fill
from ..errors import AdapterError, CaptureError, ConfigError, UncoveredOperatorError
from ..graph.modules import accepts, refresh
from ..lowering.backend import Backend
from ..lowering.lower import Lowered
from ..pipeline import Context, Observer, Pipeline
from ..tree.wrappers import innermost, is_fsdp1
from .acting import Acting, acts_in
from .call_key import Call, CallKey
from .checkpointing import without_reentrant
from .free_counters import FreeCounters
from .graph_builder import CAPTURING, GraphBuilder
from .misses import Misses, leaf_names
from .per_site import SiteInterpreter, interpret
from .programs import GuardFailed, Program, ProgramCache, guarded
from .site_graphs import SiteGraphs
from .site_policy import SitePolicy
from .traced import is_traced, run_traced
from .tree_state import TreeGuards

CAPTURES = ("auto", "graph", "sites")


@dataclass
class Dispatcher:
    """Serves the calls of one adapted tree: key, find, run.

    `capture` is "auto" (a graph of the whole call, by sites where that cannot be), "graph" (an error instead) or
    "sites". Programs are never copied or pickled with the tree: a copy makes its own.
    """

    pipeline: Pipeline
    backend: Backend
    observers: tuple[Observer, ...] = ()
    capture: str = "auto"
    programs: ProgramCache[Program] = field(init=False)
    graphs: GraphBuilder = field(init=False)
    operators: SiteGraphs = field(init=False)
    tree: TreeGuards = field(init=False)
    counters: FreeCounters = field(init=False)
    sites: SitePolicy = field(init=False)
    misses: Misses = field(init=False)
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
        self.programs, self.graphs, self.operators = ProgramCache(), GraphBuilder(self.backend), SiteGraphs()
        self.tree, self.counters, self.sites = TreeGuards(), FreeCounters(), SitePolicy(self.capture)
        self.misses, self.acting = Misses(), Acting()

    # --- a call: key, find, run --------------------------------------------------------------------------------------

    def serve(self, tree: nn.Module, context: Context, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call of the module at `path` below `tree`, by a program that is kept for its key, or is made now."""
        interpreter = SiteInterpreter.running(tree)
        if interpreter is not None:
            return self.sites.step_into(interpreter, path, args, kwargs, self.serve)
        call = Call.of(tree, context, path, args, kwargs)
        if is_traced():
            return run_traced(call, self.pipeline, self.observers)
        key = self.key(call)
        kept = self.programs.of(key)
        for program in kept:
            with suppress(GuardFailed):  # it is a graph for other sizes
                return self.run(program, call)
        return self.run_first(self.make(key, call, len(kept)), call)

    def key(self, call: Call) -> CallKey:
        """What the programs are kept by that may serve a call."""
        key = CallKey.of(call, self.tree.state(call.tree))
        return self.sites.applied(self.counters.applied(key))

    def run(self, program: Program, call: Call) -> Any:
        """Run a kept program. Raises `GuardFailed` if it is a graph that does not fit the call's sizes."""
        result = self._run(program, call)
        program.hits += 1
        return result

    def run_first(self, program: Program, call: Call) -> Any:
        """Run a program with the call that it was made for."""
        try:
            return self._run(program, call)
        except GuardFailed as error:
            reason = f"the graph captured from this very call does not accept it: {error}"
            self.sites.step_down(program, CaptureError(reason))
            return self._run(program, call)
        except BaseException:
            if program.gm is None:  # the call is one that the model itself refuses
                self.programs.forget(program)
                self.sites.forget(program)
            raise

    def _run(self, program: Program, call: Call) -> Any:
        is_new = not program.hits
        if program.gm is None or program.lowered is None:
            run_operator = partial(self.operators.run, pipeline=self.pipeline, observers=self.observers)
            result, acts = interpret(call, self.tree.state(call.tree), run_operator)
            self.sites.warn_once(program)
            self.acting.see(call, acts, result)
        else:
            if is_new:
                self.acting.see(call, program.acts)
            result = self._run_graph(program.gm, program.lowered, call)
        if is_new:
            self.acting.require_gradients(call, result)
        return result

    def _run_graph(self, gm: GraphModule, lowered: Lowered, call: Call) -> Any:
        with CAPTURING:
            refresh(gm, call.tree)
            refresh(lowered.graph, call.tree)
        if gm.meta[CONTIGUOUS] and not all_contiguous(call.leaves):
            raise GuardFailed("an argument is not contiguous")
        leaves, output = guarded(lowered.run, call.leaves), lowered.output
        return fill(leaves, output, call.args, call.kwargs) if gm.meta[FILLS] else output.unflatten(leaves)

    # --- a new kind of call ------------------------------------------------------------------------------------------

    def program(self, tree: nn.Module, context: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
        """What serves a call of the whole model, without running it."""
        call = Call.of(tree, context, "", args, kwargs)
        key = self.key(call)
        kept = self.programs.of(key)
        fitting = (each for each in kept if each.gm is None or accepts(each.gm, call.args, call.kwargs))
        return next(fitting, None) or self.make(key, call, len(kept))

    def make(self, key: CallKey, call: Call, tried: int) -> Program:
        """Make and keep what serves a new kind of call, whose key has `tried` programs, none of which fits."""
        with CAPTURING:
            kept = self.programs.of(key)
            if len(kept) > tried:
                return kept[-1]  # another thread has made it meanwhile
            require_adapted_modules(call)
            without_reentrant(call.tree)
            names = leaf_names(call)
            if self.capture != "sites":
                self.counters.learn(call, key, names, (program.key for program in self))
            program = Program(title_of(call), self.key(call), names)
            program.why, changing = self.misses.explain(program, self)
            self.decide(program, call, changing if self.capture != "graph" else "")
            self.sites.settle(program)
            self.programs.keep(self.key(call), program)  # the key as it is now: the model may have changed itself
            return program

    def decide(self, program: Program, call: Call, changing: str) -> None:
        """Decide what serves a new kind of call from now on: a graph of it, made now, or the model by sites.

        `changing` is the reason against a graph that the calls before it give, if any.
        """
        kept = len(self.programs.of(program.key))
        program.reason = self.sites.reason_against_a_graph(program.key, self.tree.state(call.tree), kept) or changing
        if program.reason and self.capture == "graph":
            name = type(call.tree.get_submodule(call.path)).__name__
            raise CaptureError(f"{name} is not served by a graph: {program.reason}")
        if program.reason:
            return
        try:
            self.graphs.build(program, call, self.pipeline, self.observers, unroll=self.capture == "graph")
            program.acts = program.gm is not None and acts_in(program.gm)
        except UncoveredOperatorError:
            raise
        except CaptureError as error:
            self.sites.step_down(program, error)


def title_of(call: Call) -> str:
    """What people see of a call: what is called, and with which arguments."""
    title = describe_call(call.tree.get_submodule(call.path), call.args, call.kwargs)
    return f"{call.path}({title})" if call.path else title


def require_adapted_modules(call: Call) -> None:
    """Raise `AdapterError` if modules that an adapter hangs below, or the weights there, have been replaced since."""
    for adapter in call.context.adapters:
        adapter.require_in_place(call.tree)
        computed = [site.name for site in adapter.selection if _is_computed(call.tree, site)]
        if computed:
            raise AdapterError(
                f"{', '.join(computed)}: the weight that the adapter {adapter.name!r} adapts is no tensor of its module"
                " any more, as when it is parametrized, normed or pruned; undo that, or delete the adapter"
            )


def _is_computed(tree: nn.Module, site: Site) -> bool:
    """Whether a site's module has no such tensor of its own since, but computes its weight.

    FSDP1 has whole ones there while it runs, and says so nowhere.
    """
    if site.storage.whole:
        return False
    owner = innermost(tree.get_submodule(site.module))
    missing = owner._parameters.get(site.parameter) is None and owner._buffers.get(site.parameter) is None
    return missing and not any(map(is_fsdp1, tree.modules()))
