"""Dispatch: what serves a call. Each kind of call is captured once, rewritten by the pipeline, and kept."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from ..capture.arguments import fill
from ..capture.caches import is_length
from ..capture.export import FILLS, argument_names, collecting_later, describe_call, images, trace_part
from ..capture.purity import Changed
from ..errors import AdapterError, CaptureError, ConfigError, UncoveredOperatorError
from ..graph.masks.sizes import ONES
from ..graph.modules import accepts, copied, refresh
from ..lowering.backend import Backend
from ..lowering.lower import Lowering
from ..ops.modes import modes
from ..pipeline.pipeline import Context, Observer, Pipeline
from ..tree.attached import has_copies_among_children, trained_paths
from ..tree.lookup import find_tensor, tensor_at
from ..tree.mirror import MIRRORED_AS
from .call_key import COUNTER, Call, CallKey, changed_counters, full_masks, is_counter, leaf_key, leaf_names
from .misses import Misses
from .per_site import BySites
from .programs import Kept, Program
from .settled import settled
from .tree_state import ANY, Layout, tensor_layout

CAPTURES = ("auto", "graph", "sites")
SIZES = 4  # a kind of call whose graphs fit one size each, as those of an unrolled loop do, gets no more than these
OPERATORS = 65_536  # one-site graphs are small, and a large model by sites has thousands
_capturing = threading.RLock()  # torch.export and what is put in its way are the process's


class GuardFailed(Exception):
    """A kept graph does not fit the call's sizes."""


@dataclass
class Dispatcher:
    """The programs of one adapted tree. They are never copied or pickled with it: a copy captures its own.

    `capture` is "auto" (a graph of the whole call, by sites where that cannot be), "graph" (an error instead) or
    "sites". `capacity` is how many programs are kept.
    """

    pipeline: Pipeline
    backend: Backend
    observers: tuple[Observer, ...] = ()
    capture: str = "auto"
    capacity: int = 64
    programs: Kept = field(init=False)
    captures: Kept = field(init=False)  # graphs as captured, by their key without adapters
    operators: Kept = field(init=False)
    layout: Layout = field(init=False)
    stepped: set[tuple[str, int]] = field(init=False)  # parts whose own Python ran, by the layout it ran in
    whole: set[str] = field(init=False)  # parts that are a graph even so
    sited: set[CallKey] = field(init=False)  # what goes by sites, whatever the model's attributes are
    settling: set[CallKey] = field(init=False)  # what has changed the model's attributes once
    misses: Misses = field(init=False)
    counters: dict[Hashable, frozenset[int]] = field(init=False)
    constants: dict[Hashable, frozenset[int]] = field(init=False)  # integers that graphs must be specialised on
    lowering: Lowering = field(init=False)
    warned: bool = field(init=False)
    generation: int = field(init=False)

    def __post_init__(self) -> None:
        if self.capture not in CAPTURES:
            raise ConfigError(f"capture={self.capture!r} is none of {', '.join(CAPTURES)}")
        self.clear()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("pipeline", "backend", "observers", "capture", "capacity")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.clear()

    def __iter__(self) -> Iterator[Program]:
        return (program for kept in self.programs.values() for program in kept)

    def clear(self) -> None:
        """Forget every program."""
        self.programs, self.captures, self.operators = Kept(self.capacity), Kept(self.capacity), Kept(OPERATORS)
        self.layout, self.generation, self.warned = Layout(), -1, False
        self.lowering = Lowering(self.backend)
        self.stepped, self.whole, self.sited, self.settling = set(), set(), set(), set()
        self.misses, self.counters, self.constants = Misses(self.layout), {}, {}

    # --- a call ------------------------------------------------------------------------------------------------------

    def serve(self, tree: nn.Module, context: Context, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call of the module at `path` below `tree`; captured now if no kept graph fits."""
        mode = BySites.running(tree)
        if mode is not None:
            return self._step_into(mode, path, args, kwargs)
        call = Call.of(args, settled(tree, path, kwargs))
        key = self._key(tree, context, path, call)
        kept = tuple(self.programs.of(key))
        for program in kept:
            try:
                result = self._run(program, tree, context, call)
            except GuardFailed:
                continue
            program.hits += 1
            return result
        program = self._new(tree, context, key, call, len(kept))
        try:
            return self._run(program, tree, context, call)
        except GuardFailed as error:
            reason = f"the graph captured from this very call does not accept it: {error}"
            self._step_down(program, CaptureError(reason))
            return self._run(program, tree, context, call)
        except BaseException:
            if program.gm is None:  # the call is one that the model itself refuses
                self.programs.forget(program)
                self.sited.discard(_by_any(program.key))
            raise

    def program(self, tree: nn.Module, context: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
        """What serves a call of the whole model, without running it."""
        call = Call.of(args, settled(tree, "", kwargs))
        key = self._key(tree, context, "", call)
        kept = self.programs.of(key)
        return kept[-1] if kept else self._new(tree, context, key, call, 0)

    def _key(self, tree: nn.Module, context: Context, path: str, call: Call) -> CallKey:
        args, kwargs, leaves, spec = call
        layout, attributes = self.layout.number(tree)
        if self.generation != self.layout.generation:
            require_whole(tree, context)
            self.generation = self.layout.generation
        adapters = tuple([(a.name, tensor_layout(tensor_at(tree, next(a.paths)))) for a in context.adapters])
        fixed = {id(image): tuple(image.shape[-2:]) for image in images(args, kwargs)}
        keys = tuple([leaf_key(leaf, fixed.get(id(leaf), ())) for leaf in leaves])
        if self.counters:
            free = self.counters.get((path, spec), ())
            keys = tuple([COUNTER if number in free and is_counter(k) else k for number, k in enumerate(keys)])
        key = CallKey(path, spec, keys, *modes(), layout, adapters, context.merged, attributes, full_masks(kwargs))
        return _by_any(key) if self.sited and _by_any(key) in self.sited else key

    def _run(self, program: Program, tree: nn.Module, context: Context, call: Call) -> Any:
        gm, lowered = program.gm, program.lowered
        if gm is None or lowered is None:
            result = self._by_sites(tree, context, program.key.part, call)
            self._warn_of(program)
            return result
        with _capturing:  # torch.export changes how modules are called, in all threads: wait until it is done
            refresh(gm, tree)
            refresh(lowered.graph, tree)
        leaves, made = _guarded(lowered.run, call.leaves), lowered.output
        return fill(leaves, made, call.args, call.kwargs) if gm.meta[FILLS] else made.unflatten(leaves)

    # --- a new kind of call ------------------------------------------------------------------------------------------

    def _new(self, tree: nn.Module, context: Context, key: CallKey, call: Call, tried: int) -> Program:
        """Make and keep what serves a call: its graph, or the model by sites where that cannot be."""
        with _capturing:
            kept = self.programs.of(key)
            if len(kept) > tried:
                return kept[-1]  # another thread has made it meanwhile
            return self._make(tree, context, key, call)

    def _make(self, tree: nn.Module, context: Context, key: CallKey, call: Call) -> Program:
        part = tree.get_submodule(key.part)
        names = leaf_names(argument_names(part.forward, call.args), call.args, call.kwargs)
        self._free_counters(tree, key, names, call)
        key = self._key(tree, context, key.part, call)
        title = describe_call(part, call.args, call.kwargs)
        program = Program(f"{key.part}({title})" if key.part else title, key, names, why="")
        program.why, changing = self.misses.explain(program, self)
        program.reason = self._reason_against_a_graph(key) or (changing if self.capture != "graph" else "")
        if program.reason and self.capture == "graph":
            raise CaptureError(f"{type(part).__name__} is not served by a graph: {program.reason}")
        if not program.reason:
            try:
                self._capture(program, tree, context, call)
            except UncoveredOperatorError:
                raise
            except CaptureError as error:
                self._step_down(program, error)
        if program.gm is None and not self._may_settle(program):
            self.sited.add(_by_any(key))
        # The key as it is now: a model may settle something in its config the first time it runs.
        self.programs.keep(self._key(tree, context, key.part, call), program)
        return program

    def _may_settle(self, program: Program) -> bool:
        """Whether the model changed itself while it was captured, for the first time: it may be done with that now."""
        first = program.changes and _by_any(program.key) not in self.settling
        self.settling.add(_by_any(program.key))
        return first

    def _reason_against_a_graph(self, key: CallKey) -> str:
        if self.capture == "sites" and key.part not in self.whole:
            return "asked for by capture='sites'"
        if self.layout.hooked:
            return "somebody's hooks on inner modules expect to be called"
        if self.layout.sharded:
            return "its parameters are sharded, and whole only while a module's own forward runs"
        if (key.part, key.layout) in self.stepped and key.part not in self.whole:
            return "it is part of a call that is served by sites"
        many = len(self.programs.of(key)) >= SIZES and self.capture != "graph"
        return f"its graphs fit few sizes: {SIZES} were captured and none fits this call" if many else ""

    def _capture(self, program: Program, tree: nn.Module, context: Context, call: Call) -> None:
        """Capture, rewrite, lower. What differs in adapters alone is captured once."""
        args, kwargs = call.args, call.kwargs
        with collecting_later():
            start = time.perf_counter()
            bare = program.key._replace(adapters=(), merged=frozenset(), full=())
            captured = next((gm for gm in self.captures.of(bare) if accepts(gm, args, kwargs)), None)
            if captured is None:
                unroll = self.capture == "graph"
                once = any("blocks" in p.establishes for p in self.pipeline)
                captured = trace_part(tree, program.key.part, args, kwargs, program.free, unroll, once)
                self.captures.keep(bare, captured)
            gm = copied(captured, tree)
            for node, name in zip(gm.graph.find_nodes(op="placeholder"), program.names):
                node.meta[ONES] = name in program.key.full
            program.seconds = time.perf_counter() - start
            program.steps = self.pipeline.run(gm, replace(context, trained=trained_paths(tree)), self.observers)
            program.gm, program.lowered = gm, self.lowering.lower(gm)

    def _free_counters(self, tree: nn.Module, key: CallKey, names: tuple[str, ...], call: Call) -> None:
        """Stop specialising on integers that change from one call to the next: what caches count, numbers of tokens."""
        place = key.part, key.structure
        lengths = {i for i, name in enumerate(names) if is_length(name) and is_counter(key.leaves[i])}
        changed = frozenset().union(*(changed_counters(key, program.key) for program in self)) - lengths
        changed -= self.constants.get(place, frozenset())
        if self.capture == "sites" or not (lengths or changed):
            return
        if changed and not self._may_be_any(tree, key.part, changed | lengths, call):
            self.constants[place] = self.constants.get(place, frozenset()) | changed
            changed = frozenset()
        self.counters[place] = self.counters.get(place, frozenset()) | changed | lengths

    def _may_be_any(self, tree: nn.Module, path: str, free: frozenset[int], call: Call) -> bool:
        """Whether the model computes the same with integers as with symbols for them, and not `isinstance(n, int)`."""
        try:
            graphs = [trace_part(tree, path, call.args, call.kwargs, f, unroll=False).graph for f in (free, ())]
        except CaptureError:
            return False
        symbolic, plain = ([n.target for n in g.nodes if isinstance(n.target, torch._ops.OpOverload)] for g in graphs)
        sizes = {torch.ops.aten.sym_size.int}
        return [op for op in symbolic if op not in sizes] == [op for op in plain if op not in sizes]

    def _step_down(self, program: Program, error: CaptureError) -> None:
        """Serve a call by sites from now on, because of `error`."""
        if self.capture == "graph":
            raise error
        program.gm, program.reason, program.failed = None, str(error), True
        program.changes = isinstance(error.__cause__, Changed)

    def _warn_of(self, program: Program) -> None:
        if program.failed and not self.warned:
            self.warned = True
            warnings.warn(
                f"{program.reason}\nThe model's own Python runs instead, with a graph for each site: same results, "
                "less fusion. `explain()` lists such calls; capture='graph' makes them an error."
            )

    # --- by sites ----------------------------------------------------------------------------------------------------

    def _by_sites(self, tree: nn.Module, context: Context, path: str, call: Call) -> Any:
        """Run the model's own Python, each read of an adapted tensor as a graph of its own."""
        mode = BySites(tree, context, self.layout.number(tree).layout, path, self._operate)
        with mode.active():
            return own_forward(tree, path)(*call.args, **call.kwargs)

    def _step_into(self, mode: BySites, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a part's own Python; where that reads an adapted tensor in an odd way, the part as a graph of its own."""
        self.stepped.add((path, mode.layout))
        if has_copies_among_children(mode.tree.get_submodule(path)):
            self.whole.add(path)  # a Sequential would run the copies as layers of its own
        if path not in self.whole:
            try:
                with mode.inside(path):
                    return own_forward(mode.tree, path)(*args, **kwargs)
            except UncoveredOperatorError:
                if any(other.startswith(f"{path}.") for other, _ in self.stepped):
                    raise
                self.whole.add(path)
        with mode.suspended():
            return self.serve(mode.tree, mode.context, path, args, kwargs)

    def _operate(self, key: Hashable, inputs: list[Any], capture: Callable[[], tuple[GraphModule, Context]]) -> Any:
        """Run one operator that reads an adapted tensor."""
        for gm in self.operators.of(key):
            try:
                return _guarded(gm, inputs)
            except GuardFailed:
                continue
        with _capturing:
            gm, context = capture()
            self.pipeline.run(gm, replace(context, trained=trained_paths(gm)), self.observers)
            self.operators.keep(key, gm)
        return _guarded(gm, inputs)


def own_forward(tree: nn.Module, path: str) -> Callable[..., Any]:
    """The forward that the module at `path` has of itself, below what lorafx put in its place."""
    part = tree.get_submodule(path)
    forward = vars(part).get("forward")
    if "forward" in getattr(forward, "replaced", ()):
        return forward.replaced["forward"]  # type: ignore[union-attr]
    return getattr(type(part), MIRRORED_AS, type(part)).forward.__get__(part)


def require_whole(tree: nn.Module, context: Context) -> None:
    """Raise `AdapterError` if modules that an adapter hangs below have been replaced or taken away."""
    for adapter in context.adapters:
        owners = {path: site for site, by_suffix in adapter.tensors.items() for path in by_suffix.values()}
        lost = dict.fromkeys(site for path, site in owners.items() if find_tensor(tree, path) is None)
        if lost:
            raise AdapterError(
                f"{', '.join(lost)}: replaced or taken away since the adapter {adapter.name!r} was put there, and its "
                "tensors with them; delete the adapter, or change the model before adapting it"
            )


def _by_any(key: CallKey) -> CallKey:
    """The key of a call that is served by the model's own Python, which reads attributes itself."""
    return key._replace(attributes=ANY)


def _guarded(run: Callable[..., Any], inputs: list[Any]) -> Any:
    try:
        return run(*inputs)
    except AssertionError as error:
        if str(error).startswith("Guard failed"):  # the first thing a graph does, before it computes anything
            raise GuardFailed(str(error)) from error
        raise
