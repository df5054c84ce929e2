"""Dispatch: what serves a call. Each kind of call is captured once, rewritten by the pipeline, and kept."""

from __future__ import annotations

import functools
import inspect
import time
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import GraphModule

from .by_sites import BySites
from .caches import is_length
from .capture import argument_names, describe_call, refresh, trace_part
from .errors import CaptureError, ConfigError, UncoveredOperatorError
from .key import (
    COUNTER,
    CallKey,
    changed_counters,
    differences,
    flat,
    images,
    is_counter,
    leaf_key,
    leaf_names,
    modes,
    settings,
)
from .layout import Layout, tensor_layout
from .lower import lower
from .pipeline import Context, Observer, Pipeline
from .report import Step
from .tree import MIRRORED_AS, has_copies_among_children, tensor_at

CAPTURES = ("auto", "graph", "sites")
SIZES = 4  # a kind of call whose graphs fit one size each, as those of an unrolled loop do, gets no more than these
OPERATORS = 65_536  # one-site graphs are small, and a large model by sites has thousands
MISSES = 4  # so many captures for one constant alone deserve a warning


class GuardFailed(Exception):
    """A kept graph does not fit the call's sizes."""


@dataclass
class Program:
    """What serves a kind of call, and how it came about: a rewritten graph, or (`gm` is None) the model by sites."""

    title: str
    key: CallKey
    names: tuple[str, ...]
    why: str
    run: Callable[..., Any]
    gm: GraphModule | None = None
    reason: str = ""
    steps: tuple[Step, ...] = ()
    seconds: float = 0.0
    hits: int = 0

    @property
    def free(self) -> list[int]:
        """The leaves that are integers and may be any other."""
        return [number for number, leaf in enumerate(self.key.leaves) if leaf == COUNTER]


class Kept(OrderedDict[Hashable, list[Any]]):
    """What serves, by key, several where sizes differ; the least recently used makes room beyond `capacity`."""

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.dropped = capacity, 0

    def of(self, key: Hashable) -> Sequence[Any]:
        """What is kept for a key, which counts as used now."""
        if key not in self:
            return ()
        self.move_to_end(key)
        return self[key]

    def keep(self, key: Hashable, served_by: Any) -> None:
        """Keep one more."""
        self.setdefault(key, []).append(served_by)
        self.move_to_end(key)
        while len(self) > 1 and sum(map(len, self.values())) > self.capacity:
            self.dropped += len(self.popitem(last=False)[1])


@dataclass
class Dispatcher:
    """The programs of one adapted tree. They are never copied or pickled with it: a copy captures its own.

    `capture` is "auto" (a graph of the whole call, by sites where that cannot be), "graph" (an error instead) or
    "sites". `capacity` is how many programs are kept.
    """

    pipeline: Pipeline
    backend: str
    observers: tuple[Observer, ...] = ()
    capture: str = "auto"
    capacity: int = 64
    programs: Kept = field(init=False)
    operators: Kept = field(init=False)
    layout: Layout = field(init=False)
    stepped: set[str] = field(init=False)
    whole: set[str] = field(init=False)
    misses: Counter[str] = field(init=False)
    counters: dict[Hashable, frozenset[int]] = field(init=False)

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
        self.programs, self.operators = Kept(self.capacity), Kept(OPERATORS)
        self.layout, self.stepped, self.whole, self.misses = Layout(), set(), set(), Counter()
        self.counters = {}

    # --- a call ------------------------------------------------------------------------------------------------------

    def serve(self, tree: nn.Module, context: Context, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call of the module at `path` below `tree`; captured now if no kept graph fits."""
        mode = BySites.running(tree)
        if mode is not None:
            return self._step_into(mode, path, args, kwargs)
        kwargs = settled(tree, path, kwargs)
        key = self._key(tree, context, path, args, kwargs)
        for program in self.programs.of(key):
            try:
                result = self._run(program, tree, args, kwargs)
            except GuardFailed:
                continue
            program.hits += 1
            return result
        program = self._new(tree, context, key, args, kwargs)
        try:
            return self._run(program, tree, args, kwargs)
        except GuardFailed as error:
            reason = f"the graph captured from this very call does not accept it: {error}"
            self._step_down(program, tree, context, CaptureError(reason))
            return self._run(program, tree, args, kwargs)

    def program(self, tree: nn.Module, context: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
        """What serves a call of the whole model, without running it."""
        kwargs = settled(tree, "", kwargs)
        key = self._key(tree, context, "", args, kwargs)
        kept = self.programs.of(key)
        return kept[-1] if kept else self._new(tree, context, key, args, kwargs)

    def _key(
        self, tree: nn.Module, context: Context, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> CallKey:
        leaves, spec = flat(args, kwargs)
        adapters = tuple([(a.name, tensor_layout(tensor_at(tree, next(a.paths)))) for a in context.adapters])
        fixed = {id(image): tuple(image.shape[-2:]) for image in images(args, kwargs)}
        keys = tuple([leaf_key(leaf, fixed.get(id(leaf), ())) for leaf in leaves])
        if self.counters:
            free = self.counters.get((path, spec), ())
            keys = tuple([COUNTER if number in free and is_counter(k) else k for number, k in enumerate(keys)])
        layout = self.layout.number(tree)
        return CallKey(path, spec, keys, *modes(), layout, adapters, context.merged, settings(tree))

    def _run(self, program: Program, tree: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if program.gm is None:
            return program.run(*args, **kwargs)
        refresh(program.gm, tree)
        return _guarded(program.run, args, kwargs)

    # --- a new kind of call ------------------------------------------------------------------------------------------

    def _new(
        self, tree: nn.Module, context: Context, key: CallKey, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Program:
        """Make and keep what serves a call: its graph, or the model by sites where that cannot be."""
        part = tree.get_submodule(key.part)
        names = leaf_names(argument_names(part.forward, args), args, kwargs)
        self._free_counters(key, names)
        key = self._key(tree, context, key.part, args, kwargs)
        call = describe_call(part, args, kwargs)
        program = Program(
            title=f"{key.part}({call})" if key.part else call,
            key=key,
            names=names,
            why="",
            run=functools.partial(self._by_sites, tree, context, key.part),
            reason=self._reason_against_a_graph(key),
        )
        program.why = self._why(program)
        if program.reason and self.capture == "graph":
            raise CaptureError(f"{type(part).__name__} is not served by a graph: {program.reason}")
        if not program.reason:
            try:
                self._capture(program, tree, context, args, kwargs)
            except UncoveredOperatorError:
                raise
            except CaptureError as error:
                self._step_down(program, tree, context, error)
        # The key as it is now: a model may settle something in its config the first time it runs.
        self.programs.keep(self._key(tree, context, key.part, args, kwargs), program)
        return program

    def _reason_against_a_graph(self, key: CallKey) -> str:
        if self.capture == "sites" and key.part not in self.whole:
            return "asked for by capture='sites'"
        if self.layout.hooked:
            return "somebody's hooks on inner modules expect to be called"
        if self.capture == "graph":
            return ""
        if key.part in self.stepped - self.whole:
            return "it is part of a call that is served by sites"
        many = len(self.programs.of(key)) >= SIZES
        return f"its graphs fit few sizes: {SIZES} were captured and none fits this call" if many else ""

    def _capture(
        self, program: Program, tree: nn.Module, context: Context, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Capture, rewrite, lower."""
        start = time.perf_counter()
        unroll = self.capture == "graph"
        gm = trace_part(tree, program.key.part, args, kwargs, program.free, unroll)
        program.seconds = time.perf_counter() - start
        program.steps = self.pipeline.run(gm, context, self.observers)
        program.gm, program.run = gm, lower(gm, self.backend)

    def _free_counters(self, key: CallKey, names: tuple[str, ...]) -> None:
        """Stop specialising on integers that change from one call to the next: what caches count, numbers of tokens."""
        changed = frozenset().union(*(changed_counters(key, program.key) for program in self))
        changed |= {i for i, name in enumerate(names) if is_length(name) and is_counter(key.leaves[i])}
        if changed and self.capture != "sites":
            place = key.part, key.structure
            self.counters[place] = self.counters.get(place, frozenset()) | changed

    def _why(self, program: Program) -> str:
        """In what the call differs from the most similar one that is kept; warns of a constant that keeps changing."""
        same_part = [other for other in self if other.key.part == program.key.part]
        found = [list(differences(program.key, program.names, other.key, other.names)) for other in same_part]
        if not found:
            return "the first call"
        nearest = min(found, key=len)
        if not nearest:
            return "other sizes than the kept graph serves"
        if len(nearest) == 1:
            self._count_miss(program, nearest[0].partition(":")[0])
        more = [f"and {len(nearest) - 3} more"] if len(nearest) > 3 else []
        return "; ".join([*nearest[:3], *more])

    def _count_miss(self, program: Program, name: str) -> None:
        if name not in program.names or len(program.key.leaves[program.names.index(name)]) != 2:
            return
        self.misses[name] += 1
        if self.misses[name] == MISSES:
            warnings.warn(
                f"the argument {name} has had {MISSES + 1} values so far, and a graph is captured for each. Pass it as "
                "a tensor, or as one value, to capture once."
            )

    def _step_down(self, program: Program, tree: nn.Module, context: Context, error: CaptureError) -> None:
        """Serve a call by sites from now on, because of `error`; the first time, say so."""
        if self.capture == "graph":
            raise error
        if not self.stepped:
            warnings.warn(
                f"{error}\nThe model's own Python runs instead, with a graph for each site: same results, less fusion. "
                "`explain()` lists such calls; capture='graph' makes them an error."
            )
        program.gm, program.reason = None, str(error)
        program.run = functools.partial(self._by_sites, tree, context, program.key.part)

    # --- by sites ----------------------------------------------------------------------------------------------------

    def _by_sites(self, tree: nn.Module, context: Context, path: str, *args: Any, **kwargs: Any) -> Any:
        """Run the model's own Python, each read of an adapted tensor as a graph of its own."""
        self.stepped.add(path)
        mode = BySites(tree, context, self.layout.number(tree), path, self._operate)
        with mode.active():
            return own_forward(tree, path)(*args, **kwargs)

    def _step_into(self, mode: BySites, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a part's own Python; where that reads an adapted tensor in an odd way, the part as a graph of its own."""
        self.stepped.add(path)
        if has_copies_among_children(mode.tree.get_submodule(path)):
            self.whole.add(path)  # a Sequential would run the copies as layers of its own
        if path not in self.whole:
            try:
                with mode.inside(path):
                    return own_forward(mode.tree, path)(*args, **kwargs)
            except UncoveredOperatorError:
                if any(other.startswith(f"{path}.") for other in self.stepped):
                    raise
                self.whole.add(path)
        with mode.suspended():
            return self.serve(mode.tree, mode.context, path, args, kwargs)

    def _operate(self, key: Hashable, inputs: list[Any], capture: Callable[[], tuple[GraphModule, Context]]) -> Any:
        """Run one operator that reads an adapted tensor."""
        for gm in self.operators.of(key):
            try:
                return _guarded(gm, tuple(inputs), {})
            except GuardFailed:
                continue
        gm, context = capture()
        self.pipeline.run(gm, context, self.observers)
        self.operators.keep(key, gm)
        return _guarded(gm, tuple(inputs), {})


def own_forward(tree: nn.Module, path: str) -> Callable[..., Any]:
    """The forward that the module at `path` has of itself, below what lorafx put in its place."""
    part = tree.get_submodule(path)
    forward = vars(part).get("forward")
    if "forward" in getattr(forward, "replaced", ()):
        return forward.replaced["forward"]  # type: ignore[union-attr]
    return getattr(type(part), MIRRORED_AS, type(part)).forward.__get__(part)


def settled(tree: nn.Module, path: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments in one order, without those that only say None where that is the default."""
    defaults = _none_by_default(type(tree.get_submodule(path)))  # type: ignore[arg-type]
    return {name: kwargs[name] for name in sorted(kwargs) if kwargs[name] is not None or name not in defaults}


@functools.cache
def _none_by_default(module: type[nn.Module]) -> frozenset[str]:
    parameters = inspect.signature(module.forward).parameters.values()
    return frozenset(p.name for p in parameters if p.default is None)


def _guarded(run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return run(*args, **kwargs)
    except AssertionError as error:
        if str(error).startswith("Guard failed"):  # the first thing a graph does, before it computes anything
            raise GuardFailed(str(error)) from error
        raise
