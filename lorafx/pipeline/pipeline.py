"""Pipelines: a tuple of passes that is run on a graph in order, each pass followed by the verifier."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import networkx as nx
from torch import nn
from torch.fx import Graph, GraphModule

from ..errors import LorafxError, PipelineError, VerifyError
from ..graph import SITE
from ..graph.blocks import LAYERS, block_calls, blocks_of, layers_of
from ..graph.modules import copied, copied_graph
from ..graph.outline import inline_call, keep_block, list_layers, run_instead
from ..graph.printing import diff, printable
from ..graph.values import each_asked_once
from ..graph.verify import Snapshot, is_changed, snapshot, verify
from ..torch_private.graphs import set_unused_graph
from .context import Context
from .definition import Pass
from .step import Step
from .text import parse_pass, split

Observer = Callable[["Pass | None", GraphModule, "Pass | None"], None]


@dataclass(frozen=True)
class _Before:
    """A graph before a pass: the snapshot that the verifier compares with, and a copy for the diff."""

    snapshot: Snapshot
    copy: GraphModule

    @classmethod
    def of(cls, gm: GraphModule) -> _Before:
        copy = GraphModule(nn.Module(), Graph())
        copy.__dict__["_modules"] = dict(gm._modules)  # blocks are shared: a diff prints them as they are by then
        set_unused_graph(copy, copied_graph(gm.graph))  # text only: never compiled, so nothing needs to resolve
        return cls(snapshot(gm), copy)


States = dict[GraphModule, _Before]


class Pipeline(tuple[Pass, ...]):
    """Passes in order. `str(pipeline)` is text that `Pipeline.parse` reads back; `+` and slices give pipelines."""

    def __new__(cls, *passes: Pass) -> Pipeline:
        return super().__new__(cls, passes)

    @classmethod
    def of(cls, passes: Pipeline | Iterable[Pass] | str) -> Pipeline:
        """A pipeline from itself, an iterable of passes, or its text (see `parse`); `PipelineError` for all else."""
        if isinstance(passes, str):
            return cls.parse(passes)
        every = list(passes) if isinstance(passes, Iterable) else [passes]
        if wrong := [each for each in every if not isinstance(each, Pass)]:
            raise PipelineError(
                f"{wrong[0]!r} is no pass. A pipeline is instances of passes, as "
                "`lorafx.passes.default + (MyPass(),)`, or their names as one text, parted by commas"
            )
        return cls(*every)

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Read `name, name{option=value}, …`; values are Python literals. Raises `PipelineError` for any other text."""
        return cls(*(parse_pass(part) for part in split(text)))

    def __str__(self) -> str:
        return ", ".join(map(str, self))

    def __add__(self, other: Iterable[Pass]) -> Pipeline:  # type: ignore[override]
        return Pipeline(*self, *other)

    def __getitem__(self, index):  # type: ignore[no-untyped-def, override]
        chosen = super().__getitem__(index)
        return Pipeline(*chosen) if isinstance(index, slice) else chosen

    def __getnewargs__(self) -> tuple[Pass, ...]:  # type: ignore[override]
        return tuple(self)

    def without(self, *names: str) -> Pipeline:
        """The pipeline without the passes of these names; `PipelineError` for a name that none has."""
        unknown = set(names) - {p.name for p in self}
        if unknown:
            raise PipelineError(f"no pass named {sorted(unknown)} in: {self}")
        return Pipeline(*(p for p in self if p.name not in names))

    @property
    def exact(self) -> bool:
        """Whether what it makes of a graph computes the same, up to rounding."""
        return all(each.exact for each in self)

    @property
    def facts(self) -> frozenset[str]:
        """What its passes establish."""
        return frozenset().union(*(each.establishes for each in self))

    def through(self, *facts: str) -> Pipeline:
        """The pipeline up to the pass that establishes one of these facts, in order of preference; all if none does."""
        places = ([place for place, p in enumerate(self) if fact in p.establishes] for fact in facts)
        return next((self[: found[0] + 1] for found in places if found), self)

    def check(self) -> None:
        """Raise `PipelineError` if a pass requires a fact that only a later pass, or none, establishes."""
        order = nx.DiGraph()
        order.add_nodes_from(range(len(self)))
        for later, needs in enumerate(self):
            for fact in sorted(needs.requires):
                makers = [i for i, p in enumerate(self) if fact in p.establishes]
                if not makers:
                    raise PipelineError(f"{needs.name} requires `{fact}`, which no pass of the pipeline establishes")
                order.add_edge(makers[0], later, fact=fact)
        wrong = next(((a, b, fact) for a, b, fact in order.edges(data="fact") if a >= b), None)
        if wrong is None:
            return
        maker, needer, fact = wrong
        message = f"{self[needer].name} requires `{fact}`, which {self[maker].name} establishes only later"
        if nx.is_directed_acyclic_graph(order):
            fixed = ", ".join(self[i].name for i in nx.lexicographical_topological_sort(order))
            message += f"; an order that works: {fixed}"
        raise PipelineError(message)

    @each_asked_once()
    def run(
        self, gm: GraphModule, context: Context | None = None, observers: Sequence[Observer] = ()
    ) -> tuple[Step, ...]:
        """Apply the passes to `gm` in place, verifying the graph before the first and after each.

        Observers are called `(previous, graph, next)` before each pass and after the last, None standing for either
        end. Returns what each pass did. Raises `PipelineError` as `check` does and for a pass that does not return how
        often it rewrote, or raises an error that is none of lorafx's, and `VerifyError` for a broken invariant, with a
        diff; both name the pass at fault and those before it.
        """
        self.check()
        context = context or Context()
        steps: list[Step] = []
        _fit(gm, context)
        printable(gm)
        verify(gm, None, context.adapters, frozenset(), context.trained)
        states = {part: _Before.of(part) for part, _ in _parts(gm, context)}
        facts: frozenset[str] = frozenset()
        for previous, current in zip((None, *self), self):
            _observe(observers, previous, gm, current)
            states, step = self._apply(current, gm, context, states, facts, steps)
            facts |= current.establishes
            steps.append(step)
        _observe(observers, self[-1] if self else None, printable(gm), None)
        return tuple(steps)

    def _apply(
        self, current: Pass, gm: GraphModule, context: Context, states: States, facts: frozenset[str], done: list[Step]
    ) -> tuple[States, Step]:
        """Run one pass on the graph and on each of its blocks: once, however many layers run the block."""
        start, rewrites, after = time.perf_counter(), 0, States()
        for part, within in _parts(gm, context):
            before = states.get(part) or _Before.of(part)
            try:
                here = _counted(current, current.rewrite(part, within))
                changed = bool(here) or part not in states or is_changed(part, before.snapshot)
                if changed:
                    part.recompile()
                known = facts | current.establishes
                verify(part, before.snapshot, within.adapters, known, within.trained, changed)
            except VerifyError as error:
                so_far = _so_far(part, done)
                raise VerifyError(f"after {current}: {error}{so_far}\n{diff(before.copy, part)}") from error
            except LorafxError:
                raise
            except Exception as error:
                what = f"{type(error).__name__}: {error}"
                raise PipelineError(f"the pass {current} raised {what}{_so_far(part, done)}") from error
            rewrites += here * len(layers_of(part))
            after[part] = _Before.of(part) if changed else before
        milliseconds = 1e3 * (time.perf_counter() - start)
        return after, _step(current, rewrites, states, after, milliseconds)


def _so_far(part: GraphModule, done: Sequence[Step]) -> str:
    """Which graph a pass was given, if it is a block, and which passes were before."""
    where = f"\nin {part.meta['name']}, run by {', '.join(part.meta[LAYERS])}" if LAYERS in part.meta else ""
    return f"{where}\nbefore it: {', '.join(step.name for step in done) or 'nothing'}"


def _counted(current: Pass, rewrites: object) -> int:
    """What a pass's `rewrite` returned, which must be the number of its rewrites."""
    if not isinstance(rewrites, int):
        raise PipelineError(
            f"`rewrite` of the pass {current.name} returned {rewrites!r}; it must return how often it rewrote, an int"
        )
    return int(rewrites)


def _fit(gm: GraphModule, context: Context) -> None:
    """Give layers whose adapters differ blocks of their own, in a graph that was captured with blocks."""
    kinds: dict[tuple[GraphModule, Hashable], GraphModule] = {}
    for call, block, layer in list(block_calls(gm)):
        within = context.relative_to(layer)
        if within is None:
            inline_call(gm, call, block, layer)
            continue
        key = block, within.signature(gm.get_submodule(layer))
        if key not in kinds:
            first = all(known is not block for known, _ in kinds)
            kinds[key] = block if first else keep_block(gm, copied(block, gm.get_submodule(layer)))
        if kinds[key] is not block:
            run_instead(call, kinds[key])
    list_layers(gm)


def _parts(gm: GraphModule, context: Context) -> Iterator[tuple[GraphModule, Context]]:
    """A graph and the blocks that it has at present, each with its context."""
    yield gm, context
    for block in blocks_of(gm):
        within = context.relative_to(block.meta[LAYERS][0])
        assert within is not None, block.meta[LAYERS]
        yield block, within


def _step(current: Pass, rewrites: int, before: States, after: States, milliseconds: float) -> Step:
    added = sites = 0
    for part, state in after.items():
        layers = len(layers_of(part))
        now = state.snapshot
        known = before[part].snapshot.tensors if part in before else now.tensors
        added += layers * sum(tensor.numel() for path, tensor in now.tensors.items() if path not in known)
        sites += layers * len({node.meta[SITE].name for node in now.nodes if SITE in node.meta})
    nodes_before, nodes = (sum(len(state.snapshot.nodes) for state in states.values()) for states in (before, after))
    return Step(str(current), rewrites, sites, nodes_before, nodes, added, milliseconds)


def _observe(observers: Sequence[Observer], previous: Pass | None, gm: GraphModule, following: Pass | None) -> None:
    for observer in observers:
        observer(previous, gm, following)
