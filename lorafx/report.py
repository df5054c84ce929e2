"""Tables and diffs: what a person reads."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from .blocks import LAYERS, blocks_of
from .deferred import heads

COLUMN = 88


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A plain-text table; numbers are set to the right."""
    cells = [[_text(value) for value in row] for row in rows]
    drawn = Table()
    for index, column in enumerate(columns):
        numeric = all(_is_number(row[index]) for row in cells)
        drawn.add_column(column, justify="right" if cells and numeric else "left", no_wrap=True)
    for row in cells:
        drawn.add_row(*row)
    console = Console(width=10_000, no_color=True)
    with console.capture() as captured:
        console.print(drawn, markup=False)
    return "\n".join([title, *(line.rstrip() for line in captured.get().splitlines())])


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}" if isinstance(value, float) else str(value)


def _is_number(text: str) -> bool:
    return text.replace(",", "").replace(".", "").removesuffix(" %").isdigit()


@dataclass(frozen=True)
class Step:
    """What one pass did to one graph; `sites` is how many sites the graph is known to run afterwards."""

    name: str
    rewrites: int
    sites: int
    nodes_before: int
    nodes_after: int
    parameters_added: int
    milliseconds: float


@dataclass(frozen=True)
class Report:
    """What the pipeline did to each captured graph, and what merging holds. Prints as tables."""

    graphs: dict[str, tuple[Step, ...]] = field(default_factory=dict)
    sites: int = 0
    merged: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __str__(self) -> str:
        columns = ("pass", "rewrites", "sites", "nodes before", "nodes after", "parameters added", "ms")
        parts = [f"{self.sites} sites, {len(self.graphs)} graphs"]
        for title, steps in self.graphs.items():
            parts.append(table(title, columns, [dataclasses.astuple(step) for step in steps]))
        if self.merged:
            totals = tuple(map(sum, zip(*self.merged.values())))
            shares = [
                (name, kept, size, f"{100 * kept / size:.1f} %")
                for name, (kept, size) in [*self.merged.items(), ("in all", totals)]
            ]
            parts.append(table("merged weights", ("weight", "bytes kept", "weight bytes", "share"), shares))
        return "\n".join(parts)


@dataclass(frozen=True)
class Call:
    """A kind of call, and what serves it: "graph", or "sites" for the `reason` given; and how its loss is computed."""

    title: str
    served_by: str
    hits: int
    capture_seconds: float
    why: str
    reason: str = ""
    loss: str = ""


@dataclass(frozen=True)
class Explanation:
    """What serves each kind of call, the longest unused first. Prints as a table.

    `operators` counts the one-site graphs that calls by sites use, `dropped` the programs that had to make room.
    `compiled` lists the pieces that were compiled, how many times each was, and torch's reasons for doing it again.
    """

    calls: tuple[Call, ...] = ()
    operators: int = 0
    dropped: int = 0
    compiled: tuple[tuple[str, int, str], ...] = ()

    def __str__(self) -> str:
        columns = ("call", "served by", "hits", "capture s", "captured because of", "loss")
        rows = [(c.title, c.served_by, c.hits, c.capture_seconds, c.why, c.loss) for c in self.calls]
        reasons = dict.fromkeys(f"by sites: {call.reason}" for call in self.calls if call.reason)
        counts = f"{len(self.calls)} kinds of call, {self.operators} one-site graphs, {self.dropped} programs dropped"
        pieces = [table("compiled pieces", ("piece", "times", "again because"), self.compiled)] if self.compiled else []
        return "\n".join([table(counts, columns, rows), *reasons, *pieces])


def graph_lines(gm: GraphModule) -> list[str]:
    """A graph as text, a line a node: `linear_1 = linear(relu, second_weight)  # (s0, 3)`; then each of its blocks."""
    return [*map(_line, gm.graph.nodes), *_with_titles(gm, graph_lines)]


def _in_reading_order(gm: GraphModule) -> list[str]:
    """The same lines with each attribute right before its first use, wherever a capture or a pass has put it."""
    order: dict[Node, None] = {}
    for node in gm.graph.nodes:
        if node.op != "get_attr":
            order.update(dict.fromkeys((*(n for n in node.all_input_nodes if n.op == "get_attr"), node)))
    return [*map(_line, order), *_with_titles(gm, _in_reading_order)]


def _with_titles(gm: GraphModule, lines: Callable[[GraphModule], list[str]]) -> Iterator[str]:
    for block in blocks_of(gm):
        yield f"{block.meta['name']}, run by {', '.join(block.meta[LAYERS])}:"
        yield from (f"    {line}" for line in lines(block))
    for spot, head in heads(gm).items():
        yield f"{spot}, when asked for:"
        yield from (f"    {line}" for line in lines(head))


def _line(node: Node) -> str:
    return f"{_operation(node)}{_shape(node)}"


def _operation(node: Node) -> str:
    if node.op == "placeholder":
        return f"{node.name} = input"
    if node.op == "output":
        return f"return {node.args[0]}"
    if node.op == "get_attr":
        return f"{node.name} = {node.target}"
    name = str(node.target) if isinstance(node.target, (str, OpOverload)) else getattr(node.target, "__name__", "")
    operator = (name or str(node.target)).removeprefix("aten.").removesuffix(".default")
    options = (f"{key}={value}" for key, value in node.kwargs.items())
    return f"{node.name} = {operator}({', '.join([*map(str, node.args), *options])})"


def _shape(node: Node) -> str:
    shape = getattr(node.meta.get("val"), "shape", None)
    return f"  # ({', '.join(map(str, shape))})" if shape is not None else ""


def diff(a: GraphModule, b: GraphModule, *, context: int = 3) -> str:
    """Two graphs side by side as text; `|` marks changed lines, `<` and `>` lines of one side, `…` what is left out.

    `context` is the number of equal lines shown around each change.
    """
    left, right = _in_reading_order(a), _in_reading_order(b)
    out: list[str] = []
    for group in difflib.SequenceMatcher(None, left, right, autojunk=False).get_grouped_opcodes(context):
        out.append("…")
        for tag, i1, i2, j1, j2 in group:
            out.extend(_side_by_side(tag, left[i1:i2], right[j1:j2]))
    return "\n".join(out) if out else "the graphs are equal"


def _side_by_side(tag: str, left: list[str], right: list[str]) -> Iterable[str]:
    height = max(len(left), len(right))
    for index in range(height):
        a = left[index] if index < len(left) else ""
        b = right[index] if index < len(right) else ""
        mark = " " if tag == "equal" else "<" if not b else ">" if not a else "|"
        yield f"{_clip(a):<{COLUMN}} {mark} {_clip(b)}".rstrip()


def _clip(text: str) -> str:
    return text if len(text) <= COLUMN else text[: COLUMN - 1] + "…"
