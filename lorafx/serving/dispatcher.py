"""The dispatcher: which program serves a call. Each kind of call gets one, made when such a call comes first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from ..adapters.by_row import ROWS
from ..capture.arguments import describe_call
from ..capture.export import FILLS
from ..capture.layout_use import CONTIGUOUS, all_contiguous
from ..capture.process_use import ENVIRONMENT
from ..capture.written_arguments import fill
from ..errors import AdapterError, CaptureError, ConfigError, UncoveredOperatorError
from ..graph.modules import accepts, refresh
from ..lowering.backend import Backend
from ..lowering.lower import Lowered
from ..pipeline import Context, Observer, Pipeline
from ..torch_private.replacing import checkpoints_replaced, scripts_replaced, threads_replaced
from ..torch_private.tensors import is_within_transform
from . import early_calls
from .acting import Acting, acts_in
from .adapted_modules import require_adapted_modules
from .before import Before, RunAgain
from .call_key import Call, CallKey
from .checkpointing import as_served_now, without_reentrant
from .choosing import has_one_token
from .direct import Direct, equation_dtype
from .early_calls import EarlyCalls
from .free_counters import FreeCounters
from .graph_builder import CAPTURING, GraphBuilder
from .interpret import interpret
from .misses import Misses, leaf_names
from .per_site import SiteInterpreter
from .programs import GuardFailed, Program, ProgramCache, guarded
from .scripts import run_script
from .site_graphs import SiteGraphs
from .site_policy import SitePolicy
from .site_table import SiteTables
from .traced import is_traced, run_traced
from .tree_state import TreeGuards

CAPTURES = ("auto", "graph", "sites")
LOOKS = 2  # so many calls of a kind are looked at: what the first keeps of a weight, the second may read
WAITS = "a graph is made when such calls have come more often"


@dataclass
class Dispatcher:
    """Serves the calls of one adapted tree: key, find, run.

    `capture` is "auto" (by sites at first, then a graph of the whole call, where that can be), "graph" (from the first
    call on, and an error where that cannot be) or "sites". Programs are never copied or pickled with the tree: a copy
    makes its own.
    """

    pipeline: Pipeline
    backend: Backend
    observers: tuple[Observer, ...] = ()
    capture: str = "auto"
    programs: ProgramCache[Program] = field(init=False)
    graphs: GraphBuilder = field(init=False)
    operators: SiteGraphs = field(init=False)
    tables: SiteTables = field(init=False)
    tree: TreeGuards = field(init=False)
    counters: FreeCounters = field(init=False)
    sites: SitePolicy = field(init=False)
    misses: Misses = field(init=False)
    early: EarlyCalls = field(init=False)
    acting: Acting = field(init=False)
    fit: defaultdict[int, set[str]] = field(init=False)  # paths of modules that adapters can act on, by layout

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
        self.tables = SiteTables()
        self.tree, self.counters, self.sites = TreeGuards(), FreeCounters(self.graphs.loops), SitePolicy(self.capture)
        self.misses, self.early, self.acting = Misses(), EarlyCalls(), Acting()
        self.fit = defaultdict(set)

    def forget(self, adapter: str) -> None:
        """Forget what was made for calls in which an adapter acts, which is deleted. What others have stays."""
        self.programs.forget_keys(lambda key: key.has(adapter))
        for each in (self.graphs, self.operators, self.tables, self.early, self.acting):
            each.forget(adapter)
        self.sites.forget_adapter(adapter)

    # --- a call: key, find, run --------------------------------------------------------------------------------------

    def serve(self, tree: nn.Module, context: Context, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call of the module at `path` below `tree`, by a program that is kept for its key, or is made now."""
        call = Call.of(tree, context, path, args, kwargs)
        if is_traced():
            if call.context.numbers:
                raise AdapterError("a call whose rows or tokens choose adapters is not recorded: give all the same one")
            return run_traced(call, self.pipeline, self.observers, self.step_into)
        key, kept = self.find(call)
        if self.sites.is_recomputed(path):
            return self._run_by_sites(call, early=True)[0]
        for program in kept:
            if program.waits and self.early.is_due(key) and not is_within_transform():  # which no capture may be in
                return self.run_first(self.make_graph(program, call), call)
            try:
                return self.run(program, call)
            except GuardFailed:  # it is a graph for other sizes
                continue
            except CaptureError:  # the next such call is given a graph, which may do what equations cannot
                if program.waits:
                    self.early.give_up(key)
                raise
        return self.run_first(self.make(key, call, len(kept)), call)

    def find(self, call: Call) -> tuple[CallKey, tuple[Program, ...]]:
        """A call's key, and what is kept for it. Layers that were told anew to checkpoint do so in our way first."""
        key = self.key(call)
        kept = self.programs.of(key)
        if not kept and without_reentrant(self.tree.modules):
            key = self.key(call)
            kept = self.programs.of(key)
        return key, kept

    def key(self, call: Call) -> CallKey:
        """What the programs are kept by that may serve a call."""
        return self._applied(CallKey.of(call, self.tree.state(call.tree)))

    def _applied(self, key: CallKey) -> CallKey:
        """A key without what is known to make no difference to graphs."""
        return self.sites.applied(self.counters.applied(key))

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
            return self.run_first(self.make_graph(program, call), call)
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
        if program.gm is not None or program.hits:
            return None
        state = self.tree.latest(call.tree)
        looked_at = self.tables.of(call.tree, call.context, state.modules).looked_at
        return Before.of(call, self.tree) if looked_at[program.key.with_any_names()] < LOOKS else None

    def _run(self, program: Program, call: Call, starts_anew: bool = False) -> Any:
        """Run a program. `starts_anew` says that whoever calls starts anew on `RunAgain`."""
        is_new = not program.hits
        if program.gm is None or program.lowered is None:
            turned = bool(call.context.numbers) and not (program.told_rows or self.early.seen(program.key))
            new = program.key if is_new else None
            result, acts = self._run_by_sites(call, program.waits, new, starts_anew, turned)
            program.told_rows = True
            self.sites.warn_once(program)
            self.acting.see(call, acts, result)
            if program.waits:
                self.early.count(program.key)
        else:
            if is_new:
                self.acting.see(call, program.acts)
            result = self._run_graph(program.gm, program.lowered, call, program.positional)
        if is_new:
            self.acting.require_gradients(call, result)
        return result

    def _run_by_sites(
        self, call: Call, early: bool, new: CallKey | None = None, starts_anew: bool = False, turned: bool = False
    ) -> tuple[Any, bool]:
        """What the model's own Python gives, and whether it ran a site. Rows may be `turned` until they were seen.

        `new` is the key of one of the first calls of a kind: all its functions are looked at, unless adapters of this
        form, whatever their names, have had so many such calls.
        """
        state = self.tree.latest(call.tree) if early else self.tree.state(call.tree)
        table = self.tables.of(call.tree, call.context, state.modules)
        run_operator = partial(self.operators.run, pipeline=self.pipeline, observers=self.observers)
        direct, rows, dtype = None, call.kwargs.get(ROWS), equation_dtype(self.pipeline)
        if self.runs_equations:
            direct = Direct(call.tree, table, dtype, rows, has_one_token(call), turned)
        ran = self.sites.ran(state.layout, early)
        kind = None if new is None else new.with_any_names()
        is_new = kind is not None and table.looked_at[kind] < LOOKS
        by_sites = SiteInterpreter(call, state, table, run_operator, self.step_into, direct, ran, is_new, starts_anew)
        result = interpret(by_sites, call)
        if is_new:
            table.looked_at[kind] += 1
        return result

    @property
    def step_into(self) -> Callable[..., Any]:
        """What a part does that the model's own Python calls."""
        return partial(self.sites.step_into, serve=self.serve)

    @property
    def runs_equations(self) -> bool:
        """Whether the equations themselves do what the pipeline makes of them, and nobody watches it."""
        return self.pipeline.exact and "adapters" in self.pipeline.facts and not self.observers

    def _run_graph(self, gm: GraphModule, lowered: Lowered, call: Call, positional: int) -> Any:
        with CAPTURING:
            refresh(gm, call.tree)
            refresh(lowered.graph, call.tree)
        if gm.meta[CONTIGUOUS] and not all_contiguous(call.leaves):
            raise GuardFailed("an argument is not contiguous")
        leaves, output = guarded(lowered.run, call.leaves), lowered.output
        return fill(leaves, output, *call.given(positional)) if gm.meta[FILLS] else output.unflatten(leaves)

    # --- a new kind of call ------------------------------------------------------------------------------------------

    def program(self, tree: nn.Module, context: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
        """What serves a call of the whole model, without running it."""
        call = Call.of(tree, context, "", args, kwargs)
        key, kept = self.find(call)
        for program in kept:
            called_alike = program.gm is None or program.positional == len(args)
            if not program.waits and called_alike and (program.gm is None or accepts(program.gm, args, call.kwargs)):
                return program
        waiting = next((program for program in kept if program.waits), None)
        return self.make_graph(waiting, call) if waiting else self.make(key, call, len(kept), at_once=True)

    def make_graph(self, waiting: Program, call: Call) -> Program:
        """Make and keep what is to serve a kind of call from now on, in the place of a program that has waited."""
        with CAPTURING:
            self.programs.forget(waiting)
            key = self.key(call)
            return self.make(key, call, 0, at_once=True)

    def make(self, key: CallKey, call: Call, tried: int, at_once: bool = False) -> Program:
        """Make and keep what serves a new kind of call, whose key has `tried` programs, none of which fits.

        Without `at_once`, a graph may wait until such calls have come more often.
        """
        with CAPTURING:
            kept = self.programs.of(key)
            if len(kept) > tried:
                return kept[-1]  # another thread has made it meanwhile
            require_adapted_modules(call, self.fit[key.layout])
            names = leaf_names(call)
            if not at_once and self.may_wait(key, call, tried):
                program = Program(title_of(call), key, names, len(call.args), waits=True, reason=WAITS)
                program.why = self.misses.why(program, self)
            else:
                program = self.make_now(key, call, names)
                key = self.key(call)  # as it is now: the model may have changed itself
            self.programs.keep(key, program)
            return program

    def may_wait(self, key: CallKey, call: Call, tried: int) -> bool:
        """Whether a new kind of call is served by the model's own Python until it has come more often."""
        if not early_calls.REPEATS or self.capture != "auto" or self.backend.is_asked_for or not self.runs_equations:
            return False
        state = self.tree.latest(call.tree)
        if tried or self.sites.is_a_graph(key.part) or self.sites.reason_against_a_graph(key, state, tried):
            return False
        if self.graphs.like(key, call):
            return False
        is_due = self.early.is_due(key) and not is_within_transform()
        return not is_due and self.tables.of(call.tree, call.context, state.modules).is_plain

    def make_now(self, key: CallKey, call: Call, names: tuple[str, ...]) -> Program:
        """What serves a kind of call from now on."""
        early = self.early.seen(key)
        if self.capture != "sites":
            self.counters.learn(call, key, names, (program.key for program in self))
        program = Program(title_of(call), self.key(call), names, len(call.args), early=early)
        others = [other for other in self if not other.waits]
        program.why = self.misses.why(program, others)
        changing = self.misses.learn(program, others)
        self.decide(program, call, changing if self.capture != "graph" else "")
        self.sites.settle(program)
        key = self.key(call)
        for other in [other for other in self if other.waits and self._applied(other.key) == key]:
            self.programs.forget(other)
        return program

    def decide(self, program: Program, call: Call, changing: str) -> None:
        """Decide what serves a new kind of call from now on: a graph of it, made now, or the model by sites.

        `changing` is the reason against a graph that the calls before it give, if any.
        """
        kept = len(self.programs.of(program.key))
        program.reason = self.sites.reason_against_a_graph(program.key, self.tree.state(call.tree), kept) or changing
        if program.reason and self.capture == "graph":
            name = type(call.tree.get_submodule(call.path)).__name__
            raise CaptureError(
                f'{name} is not served by a graph: {program.reason}. With `capture="auto"` its own Python serves '
                "such calls, with the adapters at their sites"
            )
        if program.reason:
            return
        try:
            self.graphs.build(program, call, self.pipeline, self.observers, unroll=self.capture == "graph")
            program.acts = program.gm is not None and acts_in(program.gm)
            if program.gm is not None:
                self.tree.watch_environment(call.tree, program.gm.meta[ENVIRONMENT])
        except UncoveredOperatorError:
            raise
        except CaptureError as error:
            self.sites.step_down(program, error)


def title_of(call: Call) -> str:
    """What people see of a call: what is called, and with which arguments."""
    title = describe_call(call.tree.get_submodule(call.path), call.args, call.kwargs)
    return f"{call.path}({title})" if call.path else title


# For the whole process, for whoever runs it: what comes of a call of an adapted model must find its way back to that.
checkpoints_replaced(as_served_now)
threads_replaced(as_served_now)
scripts_replaced(run_script)
