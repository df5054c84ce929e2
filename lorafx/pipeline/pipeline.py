"""Passes and pipelines: a pipeline is a tuple of passes that prints as text and parses back from that text."""

from __future__ import annotations

import ast
import dataclasses
import io
import re
import time
import tokenize
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import networkx as nx
from torch import nn
from torch.fx import Graph, GraphModule

from ..adapters.adapter import Adapter
from ..adapters.site import Selection, Site
from ..errors import PipelineError, VerifyError
from ..graph import SITE
from ..graph.blocks import LAYERS, block_calls, blocks_of
from ..graph.modules import copied, copied_graph
from ..graph.outline import inline_call, keep_block, list_layers, run_instead
from ..graph.printing import diff, printable
from ..graph.verify import Snapshot, snapshot, verify
from ..torch_private.graphs import set_unused_graph
from .step import Step

Observer = Callable[["Pass | None", GraphModule, "Pass | None"], None]


@dataclass(frozen=True)
class _Before:
    """A graph before a pass: what the verifier compares with, and the text for a diff."""

    snapshot: Snapshot
    copy: GraphModule

    @classmethod
    def of(cls, gm: GraphModule) -> _Before:
        copy = GraphModule(nn.Module(), Graph())
        copy.__dict__["_modules"] = dict(gm._modules)  # among them the blocks, as they are when the text is written
        set_unused_graph(copy, copied_graph(gm.graph))  # text only: never compiled, so nothing needs to resolve
        return cls(snapshot(gm), copy)


States = dict[GraphModule, _Before]


@dataclass(frozen=True)
class Context:
    """What a pass may need besides the graph.

    That is the active adapters in order, the names of the merged ones, and the paths of base parameters that the user
    trains along with them.
    """

    adapters: tuple[Adapter, ...] = ()
    merged: frozenset[str] = frozenset()
    trained: frozenset[str] = frozenset()

    @property
    def selection(self) -> Selection:
        """The sites of all adapters."""
        selection = Selection()
        for adapter in self.adapters:
            selection |= adapter.selection
        return selection

    def below(self, path: str) -> Context | None:
        """The context of a graph over the module at `path`; None if an adapter on it has tensors elsewhere."""
        adapters = [adapter.below(path) for adapter in self.adapters]
        if None in adapters:
            return None
        acting = tuple(a for a in adapters if a is not None and (a.selection or a.replaced))
        trained = frozenset(p.removeprefix(f"{path}.") for p in self.trained if p.startswith(f"{path}."))
        return Context(acting, self.merged & {a.name for a in acting}, trained)

    def signature(self, root: nn.Module) -> Hashable:
        """Equal for contexts in which the same passes make the same of equal graphs."""
        return tuple(adapter.signature(root) for adapter in self.adapters), self.merged

    def sites_by_weight(self, root: nn.Module) -> dict[int, Site]:
        """The sites of all adapters by the identity of the parameter they adapt."""
        return {weight: site for adapter in self.adapters for weight, site in adapter.sites_by_weight(root).items()}


@dataclass(frozen=True)
class Pass:
    """One graph transformation. A subclass is a frozen dataclass whose fields are its options.

    `requires` and `establishes` name facts about the graph; a pipeline checks its order from them. A pass keeps no
    state: what it decides goes into the graph and its nodes' `meta`. Defining a subclass makes its name parseable.
    """

    name: ClassVar[str] = ""
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset()
    known: ClassVar[dict[str, type[Pass]]] = {}

    def __init_subclass__(cls) -> None:
        cls.name = cls.__dict__.get("name") or re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
        cls.requires, cls.establishes = frozenset(cls.requires), frozenset(cls.establishes)
        Pass.known[cls.name] = cls

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        """Change `gm.graph` in place and return how many rewrites were made."""
        raise NotImplementedError

    def __str__(self) -> str:
        options = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default
        }
        text = ", ".join(f"{name}={value!r}" for name, value in options.items())
        return f"{self.name}{{{text}}}" if text else self.name


class Pipeline(tuple[Pass, ...]):
    """Passes in order. `str(pipeline)` is text that `Pipeline.parse` reads back; `+` and slices give pipelines."""

    def __new__(cls, *passes: Pass) -> Pipeline:
        return super().__new__(cls, passes)

    @classmethod
    def of(cls, passes: Pipeline | Iterable[Pass] | str) -> Pipeline:
        """A pipeline from itself, an iterable of passes, or its text."""
        return cls.parse(passes) if isinstance(passes, str) else cls(*passes)

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Read `name, name{option=value}, …`; values are Python literals. `PipelineError` says what is wrong."""
        return cls(*(_parse_pass(part) for part in _split(text)))

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
        """The pipeline with the passes of these names left out."""
        unknown = set(names) - {p.name for p in self}
        if unknown:
            raise PipelineError(f"no pass named {sorted(unknown)} in: {self}")
        return Pipeline(*(p for p in self if p.name not in names))

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

    def run(
        self, gm: GraphModule, context: Context | None = None, observers: Sequence[Observer] = ()
    ) -> tuple[Step, ...]:
        """Apply the passes to `gm` in place, verifying the graph before the first and after each.

        Observers are called `(previous, graph, next)` between passes, None standing for either end. Returns what each
        pass did. Raises `VerifyError` naming the pass at fault and those before it, with a diff.
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
        """Run one pass on the graph and on each of its blocks, once however many layers run it."""
        start, rewrites, after = time.perf_counter(), 0, States()
        for part, within in _parts(gm, context):
            before = states.get(part) or _Before.of(part)
            try:
                here = current.rewrite(part, within)
                changed = here or part not in states or snapshot(part).nodes != before.snapshot.nodes
                if changed:
                    part.recompile()
                verify(part, before.snapshot, within.adapters, facts | current.establishes, within.trained)
            except VerifyError as error:
                so_far = ", ".join(step.name for step in done) or "nothing"
                where = (
                    f" in {part.meta['name']} (run by {', '.join(part.meta[LAYERS])})" if LAYERS in part.meta else ""
                )
                raise VerifyError(
                    f"after {current}{where} (before it: {so_far}): {error}\n{diff(before.copy, part)}"
                ) from error
            rewrites += here * len(part.meta.get(LAYERS, "."))
            after[part] = _Before.of(part) if changed else before
        milliseconds = 1e3 * (time.perf_counter() - start)
        return after, _step(current, rewrites, states, after, milliseconds)


def _fit(gm: GraphModule, context: Context) -> None:
    """Give layers whose adapters differ blocks of their own, where a graph was captured with blocks."""
    kinds: dict[tuple[GraphModule, Hashable], GraphModule] = {}
    for call, block, layer in list(block_calls(gm)):
        within = context.below(layer)
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
    """A graph and its blocks, as far as there are any now, each with its context."""
    yield gm, context
    for block in blocks_of(gm):
        within = context.below(block.meta[LAYERS][0])
        assert within is not None, block.meta[LAYERS]
        yield block, within


def _step(current: Pass, rewrites: int, before: States, after: States, milliseconds: float) -> Step:
    added = sites = 0
    for part, state in after.items():
        layers = len(part.meta.get(LAYERS, "."))
        now = state.snapshot
        known = before[part].snapshot.tensors if part in before else now.tensors
        added += layers * sum(tensor.numel() for path, tensor in now.tensors.items() if path not in known)
        sites += layers * len({node.meta[SITE].name for node in now.nodes if SITE in node.meta})
    nodes_before, nodes = (sum(len(state.snapshot.nodes) for state in states.values()) for states in (before, after))
    return Step(str(current), rewrites, sites, nodes_before, nodes, added, milliseconds)


def _observe(observers: Sequence[Observer], previous: Pass | None, gm: GraphModule, following: Pass | None) -> None:
    for observer in observers:
        observer(previous, gm, following)


def _split(text: str) -> list[str]:
    """The parts of a pipeline's text between commas that stand in no bracket."""
    parts, depth, start = [], 0, 0
    flat = " ".join(text.split("\n"))
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(flat).readline))
    except (tokenize.TokenError, SyntaxError) as error:
        raise PipelineError(f"cannot read the pipeline {text!r}: {error}") from error
    for token in tokens:
        depth += (token.string in ("{", "(", "[")) - (token.string in ("}", ")", "]"))
        if token.string == "," and depth == 0:
            parts.append(flat[start : token.start[1]])
            start = token.end[1]
    return [part.strip() for part in (*parts, flat[start:]) if part.strip()]


def _parse_pass(text: str) -> Pass:
    found = re.fullmatch(r"(\w+)\s*(?:\{(.*)\})?", text)
    if not found:
        raise PipelineError(f"{text!r} is no pass; write name or name{{option=value}}")
    name, options = found[1], found[2] or ""
    if name not in Pass.known:
        raise PipelineError(f"unknown pass {name!r}; known: {', '.join(sorted(Pass.known))}")
    return _construct(Pass.known[name], options, text)


def _construct(cls: type[Pass], options: str, text: str) -> Pass:
    try:
        call = ast.parse(f"f({options})", mode="eval").body
        assert isinstance(call, ast.Call) and not call.args
        values: dict[str, Any] = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        return cls(**values)
    except (SyntaxError, ValueError, AssertionError, TypeError) as error:
        fields = ", ".join(f.name for f in dataclasses.fields(cls)) or "none"
        raise PipelineError(f"cannot read {text!r}: {error or 'options are name=value'} (options: {fields})") from error
