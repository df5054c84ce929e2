"""History: what a graph was after each pass, as plain values that outlive the graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ..errors import user_line
from ..graph.blocks import LAYERS, blocks_of
from ..graph.emit import made_by
from ..graph.printing import is_within, operation_of, places_of, shape_of
from ..ops.deferral import heads
from ..pipeline import Context, Pass, Pipeline

AS_CAPTURED = "as captured"


@dataclass(frozen=True)
class Line:
    """A node of a graph. Those that only read a tensor of the model are part of the nodes that use them.

    `code` is what it computes, of the nodes `inputs`. `module` is the path of the module whose forward it was captured
    in, and `site` that of the site that it is of, both relative to the layer in a block. `made_by` is the pass that
    wrote it, empty for the model's own, and `source` the model's line of Python.
    """

    name: str
    code: str
    inputs: tuple[str, ...] = ()
    shape: str = ""
    dtype: str = ""
    module: str = ""
    source: str = ""
    made_by: str = ""
    site: str = ""
    adapter: str = ""

    @property
    def text(self) -> tuple[str, str, str, str]:
        """What it reads like: lines of one text are equal for a reader, whatever a pass has noted about them."""
        return self.name, self.code, self.shape, self.dtype


def changes(before: Iterable[Line], after: Iterable[Line]) -> tuple[list[Line], list[Line]]:
    """The lines that are gone and those that are new."""
    before, after = list(before), list(after)
    old, new = ({line.text for line in lines} for lines in (before, after))
    return [line for line in before if line.text not in new], [line for line in after if line.text not in old]


@dataclass(frozen=True)
class Part:
    """A graph of its own: that of the call, of a block, or of logits that wait.

    `layers` are the paths of the modules that run it; of the whole call that is the root, "".
    """

    title: str
    layers: tuple[str, ...]
    lines: tuple[Line, ...]

    def path_within(self, name: str) -> str | None:
        """The path of a module relative to the layer that holds it; None if no layer of this part does."""
        for layer in self.layers:
            if is_within(layer, name):
                return name[len(layer) :].lstrip(".")
        return None

    def of_module(self, path: str) -> tuple[Line, ...]:
        """The lines of the module at a path within this part, of those inside it, and of their sites."""
        return tuple(line for line in self.lines if is_within(path, line.module) or is_within(path, line.site))


@dataclass(frozen=True)
class Stage:
    """A graph after a pass, or `AS_CAPTURED`."""

    name: str
    parts: tuple[Part, ...]

    def part(self, title: str) -> Part | None:
        """The part of this title, if it is there at this stage."""
        return next((part for part in self.parts if part.title == title), None)


@dataclass
class History:
    """The stages of a graph, in order."""

    stages: list[Stage] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[Stage, Stage]]:
        """Each stage with the one before it."""
        return zip(self.stages, self.stages[1:])

    @property
    def first(self) -> Stage:
        """The graph as captured."""
        return self.stages[0]

    @property
    def last(self) -> Stage:
        """The graph after all passes."""
        return self.stages[-1]


def record(gm: GraphModule, pipeline: Pipeline, context: Context) -> History:
    """Run a pipeline on a captured graph, which is rewritten, and record each stage."""
    history, recorder = History(), _Recorder()

    def observe(previous: Pass | None, graph: GraphModule, following: Pass | None) -> None:
        history.stages.append(Stage(str(previous) if previous else AS_CAPTURED, tuple(recorder.parts(graph))))

    pipeline.run(gm, context, (observe,))
    return history


class _Recorder:
    """Makes lines of nodes. A node's line of Python, which takes long to find, is looked up once."""

    def __init__(self) -> None:
        self._sources: dict[Node, str] = {}

    def parts(self, gm: GraphModule) -> Iterator[Part]:
        yield Part("the call", ("",), self._lines(gm))
        for block in blocks_of(gm):
            yield Part(block.meta["name"], tuple(block.meta[LAYERS]), self._lines(block))
            yield from self._heads(block)
        yield from self._heads(gm)

    def _heads(self, gm: GraphModule) -> Iterator[Part]:
        yield from (Part(f"{spot}, when asked for", (), self._lines(head)) for spot, head in heads(gm).items())

    def _lines(self, gm: nn.Module) -> tuple[Line, ...]:
        assert isinstance(gm, GraphModule)
        return tuple(self._line(node) for node in gm.graph.nodes if node.op != "get_attr")

    def _line(self, node: Node) -> Line:
        module, site = places_of(node)
        maker, value = made_by(node), node.meta.get("val")
        return Line(
            name="return" if node.op == "output" else node.name,
            code=operation_of(node, by_path=True).removeprefix("return "),
            inputs=tuple(each.name for each in node.all_input_nodes if each.op != "get_attr"),
            shape=shape_of(node),
            dtype=str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else "",
            module=module,
            source=self._source(node),
            made_by=maker.made_by if maker else "",
            site=site,
            adapter=maker.adapter if maker else "",
        )

    def _source(self, node: Node) -> str:
        if node not in self._sources:
            self._sources[node] = user_line(node) if node.meta.get("stack_trace") else ""
        return self._sources[node]


def innermost(parts: Sequence[Part], name: str) -> tuple[Part, str] | None:
    """The part in which a module's own lines are, and the module's path there; None if none has any."""
    found = [(part, path) for part in parts if (path := part.path_within(name)) is not None and part.of_module(path)]
    return min(found, key=lambda each: len(each[1]), default=None)
