"""Printing: a graph as text, a line a node, and the difference of two graphs side by side."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator

from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ..errors import SelectionError, nearest
from ..ops.deferral import heads
from ..tables import InNotebooks
from .blocks import LAYERS, blocks_of
from .emit import SITE, made_by

COLUMN = 88


def graph_lines(gm: GraphModule) -> list[str]:
    """A graph as text, a line a node: `linear_1 = linear(relu, second_weight)  # (s0, 3)`; then each of its blocks."""
    return [*map(_line, gm.graph.nodes), *_with_titles(gm, graph_lines)]


def printable(gm: GraphModule) -> GraphModule:
    """Make `print` show a graph, and each of its blocks, as `summary` and `graph_lines`; returns the graph."""
    for each in (gm, *blocks_of(gm)):  # torch.fx gives each graph module a class of its own
        type(each).__str__ = lambda self: "\n".join([summary(self), *graph_lines(self)])  # type: ignore[assignment]
    return gm


def summary(gm: GraphModule) -> str:
    """How long a graph is, which blocks it runs, and how to see one place of it, as a comment."""
    blocks = [f"{block.meta['name']} of {len(block.graph.nodes)} for {_span(block)}" for block in blocks_of(gm)]
    hint = "; the model's show(name) tells of one layer, module, site or pass" if blocks else ""
    return f"# {len(gm.graph.nodes)} nodes{''.join(f', {each}' for each in blocks)}{hint}"


def _span(block: GraphModule) -> str:
    first, *others = block.meta[LAYERS]
    return f"{first} … {others[-1]} ({len(others) + 1} layers)" if others else first


def _in_reading_order(gm: GraphModule) -> list[str]:
    """The same lines with each attribute right before its first use, so that moved reads are no difference."""
    return [*map(_line, _ordered(gm)), *_with_titles(gm, _in_reading_order)]


def _ordered(gm: GraphModule, module: str = "") -> dict[Node, None]:
    """The nodes of a module (or of all) in that order, as the keys of a dict."""
    order: dict[Node, None] = {}
    for node in gm.graph.nodes:
        if node.op != "get_attr" and any(is_within(module, place) for place in places_of(node)):
            order.update(dict.fromkeys((*(n for n in node.all_input_nodes if n.op == "get_attr"), node)))
    return order


def _at(gm: GraphModule, name: str) -> list[str]:
    """The lines of a module or site, which may be in a block."""
    for block in blocks_of(gm):
        for layer in block.meta[LAYERS]:
            if is_within(layer, name):
                return [*map(_line, _ordered(block, name[len(layer) + 1 :]))]
    return [*map(_line, _ordered(gm, name))]


def _names(gm: GraphModule) -> Iterator[str]:
    """The full names of the modules and sites that have lines in a graph or its blocks."""
    for each, layers in ((gm, ("",)), *((block, block.meta[LAYERS]) for block in blocks_of(gm))):
        places = dict.fromkeys(place for node in each.graph.nodes for place in places_of(node) if place)
        yield from (f"{layer}.{place}".lstrip(".") for layer in layers for place in places)


def places_of(node: Node) -> tuple[str, str]:
    """The path of the module in whose forward a node was captured, and that of the site that it is of, if any.

    In a block both are relative to the layer.
    """
    stack = [path.partition("@")[0] for path, _ in node.meta.get("nn_module_stack", {}).values()]
    maker, site = made_by(node), node.meta.get(SITE)
    return stack[-1] if stack else "", maker.site if maker and maker.site else site.name if site else ""


def is_within(module: str, path: str) -> bool:
    """Whether a path leads to a module or to something in it."""
    return not module or path == module or path.startswith(f"{module}.")


def _with_titles(gm: GraphModule, lines: Callable[[GraphModule], list[str]]) -> Iterator[str]:
    for block in blocks_of(gm):
        yield f"{block.meta['name']}, run by {', '.join(block.meta[LAYERS])}:"
        yield from (f"    {line}" for line in lines(block))
    for spot, head in heads(gm).items():
        yield f"{spot}, when asked for:"
        yield from (f"    {line}" for line in lines(head))


def _line(node: Node) -> str:
    name = "" if node.op == "output" else f"{node.name} = "
    return f"{name}{operation_of(node)}" + (f"  # {shape}" if (shape := shape_of(node)) else "")


def operation_of(node: Node, *, by_path: bool = False) -> str:
    """What a node computes, as text: `linear(relu, second_weight)`; the path of what it reads, `input`, `return …`.

    With `by_path`, what nodes read of the model is written where it is used: `linear(relu, second.weight)`.
    """
    if node.op == "placeholder":
        return "input"
    args, kwargs = map_arg((node.args, node.kwargs), _path) if by_path else (node.args, node.kwargs)
    if node.op == "output":
        return f"return {args[0]}"
    if node.op == "get_attr":
        return str(node.target)
    name = str(node.target) if isinstance(node.target, (str, OpOverload)) else getattr(node.target, "__name__", "")
    operator = (name or str(node.target)).removeprefix("aten.").removesuffix(".default")
    options = (f"{key}={value}" for key, value in kwargs.items())
    return f"{operator}({', '.join([*map(str, args), *options])})"


class _Path(str):
    """A path that looks in a list as it does alone."""

    __repr__ = str.__str__


def _path(node: Node) -> Node | _Path:
    return _Path(node.target) if node.op == "get_attr" else node


def shape_of(node: Node) -> str:
    """The shape of a node's tensor as text, `(s0, 3)`; nothing for another value."""
    shape = getattr(node.meta.get("val"), "shape", None)
    return f"({', '.join(map(str, shape))})" if shape is not None else ""


class Difference(InNotebooks, str):
    """What `diff` returns: text, to print."""

    __repr__ = str.__str__


def diff(a: GraphModule, b: GraphModule, *, site: str | None = None, context: int = 3) -> Difference:
    """Two graphs side by side as text; `|` marks changed lines, `<` and `>` lines of one side, `…` what is left out.

    `site` is the name of a site or a module: only its lines are compared. `context` is the number of equal lines shown
    around each change. Raises `SelectionError` for a `site` of which neither graph has a line.
    """
    left, right = (_in_reading_order(gm) if site is None else _at(gm, site) for gm in (a, b))
    if site is not None and not left and not right:
        near = nearest(site, [*_names(b), *_names(a)], "print(graph) shows what there is")
        raise SelectionError(f"neither graph has a line of {site!r}; {near}")
    out: list[str] = []
    for group in difflib.SequenceMatcher(None, left, right, autojunk=False).get_grouped_opcodes(context):
        out.append("…")
        for tag, i1, i2, j1, j2 in group:
            out.extend(_side_by_side(tag, left[i1:i2], right[j1:j2]))
    return Difference("\n".join(out) if out else "the graphs are equal")


def _side_by_side(tag: str, left: list[str], right: list[str]) -> Iterable[str]:
    height = max(len(left), len(right))
    for index in range(height):
        a = left[index] if index < len(left) else ""
        b = right[index] if index < len(right) else ""
        mark = " " if tag == "equal" else "<" if not b else ">" if not a else "|"
        yield f"{_clip(a):<{COLUMN}} {mark} {_clip(b)}".rstrip()


def _clip(text: str) -> str:
    return text if len(text) <= COLUMN else text[: COLUMN - 1] + "…"
