"""Write new nodes into a graph, with metadata recomputed and a record of the pass and site that made them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ..torch_private.graphs import name_of, schema_of
from ..torch_private.tensors import is_wrapped
from ..torch_private.tracing import FakeTensorMode
from .match import Match, Pattern, trace_function
from .values import fake_value

# Marks in a node's meta: who made it, the site whose weight it reads, the adapters inserted there.
MADE_BY, SITE, ADAPTED_BY = "lorafx", "site", "adapted_by"
INHERITED = ("stack_trace", "nn_module_stack")
_CAST = torch.ops.aten.to.dtype


@dataclass(frozen=True)
class Provenance:
    """Which pass made a node, and for which adapter at which site (both empty for a node of no site)."""

    made_by: str
    site: str = ""
    adapter: str = ""


@dataclass(frozen=True)
class Attribute:
    """What a name of a replacement may stand for: the tree's tensor at `path`, cast to `dtype` if one is given."""

    path: str
    dtype: torch.dtype | None = None


def made_by(node: Node) -> Provenance | None:
    """Who made `node`; None for a node of the captured model."""
    return node.meta.get(MADE_BY)


def marks_of(node: Node) -> dict[str, Any]:
    """The site whose weight a node reads and the adapters inserted there: `meta` for the node that replaces it."""
    return {key: node.meta[key] for key in (SITE, ADAPTED_BY) if key in node.meta}


def within_vmap(node: Node) -> bool:
    """Whether a node is inside a vmap, where nodes that use it cannot be recomputed on fake tensors."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and is_wrapped(value)


def describe(node: Node, like: Node, provenance: Provenance, gm: GraphModule, mode: FakeTensorMode) -> None:
    """Give a new node its metadata: place in the model from `like`, value recomputed, maker recorded."""
    node.meta.update({key: like.meta[key] for key in INHERITED if key in like.meta})
    node.meta[MADE_BY] = provenance
    node.meta["val"] = fake_value(node, gm, mode)


def emit(
    gm: GraphModule,
    found: Match,
    replacement: Pattern,
    fresh: dict[str, Any],
    provenance: Provenance,
    mode: FakeTensorMode,
) -> tuple[Node, tuple[Node, ...]]:
    """Put `replacement` where the match was found and erase what it covered.

    `fresh` gives the names that the pattern does not bind. Returns the node that now computes the result, and all new
    nodes.
    """
    result, new = write(gm, replacement, fresh | found.bindings, found.anchor, found.anchor, provenance, mode)
    _take_place(gm.graph, found, result)
    return result, new


def write(
    gm: GraphModule,
    replacement: Pattern,
    given: dict[str, Any],
    before: Node,
    like: Node,
    provenance: Provenance,
    mode: FakeTensorMode,
) -> tuple[Any, tuple[Node, ...]]:
    """Write the operators of `replacement` into a graph, ahead of the node `before`; nothing uses the result yet.

    `given` says what each name stands for: an `Attribute` becomes a node that reads the tensor (if the name is used),
    any other value is written as it is. New nodes get `stack_trace` and `nn_module_stack` from the node `like`. Returns
    the result and all new nodes; of a replacement without operators, the result is the value of one of its names.
    """
    graph = gm.graph
    values: dict[Node, Any] = {}
    new: list[Node] = []

    def add(node: Node) -> Node:
        describe(node, like, provenance, gm, mode)
        new.append(node)
        return node

    result: Any = None
    with graph.inserting_before(before):
        for node in trace_function(replacement).nodes:
            if node.op == "placeholder":
                value = given[str(node.target)] if node.users else None
                values[node] = _read(graph, value, add) if isinstance(value, Attribute) else value
            elif node.op == "output":
                result = values[node.args[0]]  # type: ignore[index]
            else:
                called = name_of(node.target)  # as capture names nodes: `linear`, not `linear_default`
                values[node] = add(graph.create_node(node.op, node.target, *_bound(node, values), called))
    return result, tuple(new)


def _read(graph: Graph, attribute: Attribute, add: Callable[[Node], Node]) -> Node:
    read = add(graph.get_attr(attribute.path))
    if attribute.dtype in (None, read.meta["val"].dtype):
        return read
    return add(graph.create_node("call_function", _CAST, (read, attribute.dtype), {}, "to"))


def _bound(node: Node, values: dict[Node, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args = list(torch.fx.node.map_aggregate(node.args, lambda n: values[n] if isinstance(n, Node) else n))  # type: ignore
    kwargs = torch.fx.node.map_aggregate(node.kwargs, lambda n: values[n] if isinstance(n, Node) else n)
    schema = schema_of(node.target)
    while schema and args and _is_default(schema.arguments[len(args) - 1], args[-1]):
        args.pop()  # as capture writes it: trailing defaults are left out
    return tuple(args), kwargs  # type: ignore[return-value]


def _is_default(argument: Any, value: Any) -> bool:
    return argument.has_default_value() and not isinstance(value, Node) and argument.default_value == value


def _take_place(graph: Graph, found: Match, result: Node) -> None:
    found.anchor.replace_all_uses_with(result)
    pending = list(found.nodes)
    while pending:  # users before what they use
        unused = [node for node in pending if not node.users]
        assert unused, "what a match covers is used by nobody else"
        for node in unused:
            graph.erase_node(node)
        pending = [node for node in pending if node not in unused]
    for value in found.bindings.values():
        if isinstance(value, Node):
            _erase_read(graph, value)


def _erase_read(graph: Graph, read: Node) -> None:
    """Erase a read of the tree, or a cast of one, if nothing uses it any more."""
    if not read.users and (read.op == "get_attr" or read.target is _CAST):
        cast_of = read.all_input_nodes
        graph.erase_node(read)
        for node in cast_of:
            _erase_read(graph, node)
