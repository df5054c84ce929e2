"""Printing: a graph as text, a line a node, and the difference of two graphs side by side."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator

from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from ..ops.deferral import heads
from .blocks import LAYERS, blocks_of

COLUMN = 88


def graph_lines(gm: GraphModule) -> list[str]:
    """A graph as text, a line a node: `linear_1 = linear(relu, second_weight)  # (s0, 3)`; then each of its blocks."""
    return [*map(_line, gm.graph.nodes), *_with_titles(gm, graph_lines)]


def printable(gm: GraphModule) -> GraphModule:
    """Make `print` show a graph, and each of its blocks, as `graph_lines`; returns the graph."""
    for each in (gm, *blocks_of(gm)):  # torch.fx gives each graph module a class of its own
        type(each).__str__ = lambda self: "\n".join(graph_lines(self))  # type: ignore[assignment]
    return gm


def _in_reading_order(gm: GraphModule) -> list[str]:
    """The same lines with each attribute right before its first use, so that moved reads are no difference."""
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
