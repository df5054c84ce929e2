"""Match a pattern against a node. "No match" is a value too: falsy, with the reason and the node at fault."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node, Proxy
from torch.fx.node import map_arg
from torch.fx.proxy import GraphAppendingTracer

from ..errors import user_line
from ..torch_private.graphs import schema_of


@dataclass(frozen=True)
class Match:
    """Where a pattern was found: the node that computes its result, all nodes it covers, what each name stands for."""

    anchor: Node
    nodes: tuple[Node, ...]
    bindings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NoMatch:
    """Why a pattern was not found at a node."""

    node: Node
    reason: str

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return f"{self.node.name}: {self.reason} [{user_line(self.node)}]"


Pattern = Callable[..., Any] | Graph  # a torch function of named arguments, or one that was traced before


def trace_function(function: Pattern) -> Graph:
    """The graph of a pattern or replacement, traced once."""
    return function if isinstance(function, Graph) else _traced(function)


@functools.cache
def _traced(function: Callable[..., Any]) -> Graph:
    return torch.fx.Tracer().trace(function)


def template(function: Callable[..., Any], names: Iterable[str]) -> Graph:
    """The graph of `function`, called with a keyword argument for each of `names`: a pattern or a replacement.

    For functions that take `**given`, so that their signature does not say which names there are.
    """
    graph = Graph()
    tracer = GraphAppendingTracer(graph)
    result = function(**{name: Proxy(graph.placeholder(name), tracer) for name in names})
    graph.output(result.node if isinstance(result, Proxy) else result)
    graph.eliminate_dead_code()
    return graph


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of a node by name, in its operator's order, defaults filled in.

    For a target without a schema, such as a Python function, positional arguments are named "0", "1", ….
    """
    schema = schema_of(node.target)
    if schema is None:
        return {str(number): value for number, value in enumerate(node.args)} | dict(node.kwargs)
    given = {argument.name: value for argument, value in zip(schema.arguments, node.args)}
    for argument in schema.arguments[len(node.args) :]:
        given[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return given


def match(pattern: Pattern, anchor: Node) -> Match | NoMatch:
    """Find `pattern` with its result at `anchor`.

    A name that occurs twice must stand for the same value, and no name for a node that the match covers. Of the covered
    nodes only the anchor may be used outside the match.
    """
    output = trace_function(pattern).output_node().args[0]
    bindings: dict[str, Any] = {}
    covered: dict[Node, None] = {}
    failure = _unify(output, anchor, bindings, covered, anchor)
    if failure is not None:
        return failure
    for node in covered:
        if node is not anchor and not set(node.users) <= set(covered):
            return NoMatch(node, "its result is used outside the pattern")
    given: list[Node] = []
    map_arg(tuple(bindings.values()), given.append)
    if inner := next((node for node in given if node in covered), None):
        return NoMatch(inner, "the pattern would take it for one of its own operators and for one of its inputs")
    return Match(anchor, tuple(covered), bindings)


def _unify(pattern: Any, value: Any, bindings: dict[str, Any], covered: dict[Node, None], at: Node) -> NoMatch | None:
    if isinstance(pattern, (list, tuple)) and isinstance(value, (list, tuple)) and len(pattern) == len(value):
        parts = (_unify(inner, actual, bindings, covered, at) for inner, actual in zip(pattern, value))
        return next((failure for failure in parts if failure is not None), None)
    if not isinstance(pattern, Node):
        return None if _same_literal(pattern, value) else NoMatch(at, f"expected {pattern!r}, found {value!r}")
    if pattern.op == "placeholder":
        bound = bindings.setdefault(str(pattern.target), value)
        same = bound is value or (not isinstance(value, Node) and bound == value)
        return None if same else NoMatch(at, f"`{pattern.target}` would stand for both {bound} and {value}")
    if not isinstance(value, Node) or value.op != pattern.op or value.target != pattern.target:
        found = value.target if isinstance(value, Node) else value
        return NoMatch(value if isinstance(value, Node) else at, f"expected {pattern.target}, found {found}")
    covered[value] = None
    for inner, actual in zip(arguments(pattern).values(), arguments(value).values(), strict=True):
        failure = _unify(inner, actual, bindings, covered, value)
        if failure is not None:
            return failure
    return None


def _same_literal(a: Any, b: Any) -> bool:
    """Equal, and 1 is not 1.0 or True."""
    return type(a) is type(b) and a == b
