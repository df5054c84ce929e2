"""Regions: the nodes that one call of a module was captured as, found by the `nn_module_stack` of each node."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ..tree.lookup import find_tensor
from .blocks import asks_for_checkpointing, is_of_block
from .description import node_value_key

_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True)
class Region:
    """The nodes of one call of the module at `path`, in order, without the reads of the module's own tensors."""

    path: str
    nodes: tuple[Node, ...]
    wanted: frozenset[Node] = frozenset()  # nodes that are outputs even if nothing outside uses them

    @cached_property
    def own(self) -> dict[Node, str]:
        """The reads of the module's own tensors, each with the tensor's path relative to the module."""
        reads = (n for node in self.nodes for n in node.all_input_nodes if n.op == "get_attr")
        within = f"{self.path}."
        return {n: str(n.target).removeprefix(within) for n in reads if str(n.target).startswith(within)}

    @cached_property
    def inputs(self) -> tuple[Node, ...]:
        """The nodes outside that these use, in the order of first use."""
        inside = {*self.nodes, *self.own}
        return tuple(dict.fromkeys(n for node in self.nodes for n in node.all_input_nodes if n not in inside))

    @cached_property
    def outputs(self) -> tuple[Node, ...]:
        """The nodes that are used outside."""
        inside = set(self.nodes)
        return tuple(n for n in self.nodes if n in self.wanted or any(user not in inside for user in n.users))

    def signature(self) -> Hashable:
        """A key that is equal for regions that compute the same from their inputs and their module's tensors."""
        return signature(self.inputs, self.nodes, {node: ("own", name) for node, name in self.own.items()})


def signature(inputs: Iterable[Node], nodes: Iterable[Node], named: Mapping[Node, Hashable] | None = None) -> Hashable:
    """A key that is equal for sequences of nodes that compute the same from what they are given.

    Given are the `inputs`, which count by their order, and the nodes that are `named`, which count by those names.
    """
    numbers: dict[Node, Any] = {**(named or {}), **{node: ("input", i) for i, node in enumerate(inputs)}}
    given = tuple((number, _value(node)) for node, number in numbers.items())
    nodes = [node for node in nodes if node not in numbers]
    numbers |= {node: ("node", i) for i, node in enumerate(nodes)}
    called = [
        (
            n.op,
            n.target if n.op == "call_function" else "",
            _literal(n.args, numbers),
            _literal(n.kwargs, numbers),
            _value(n),
        )
        for n in nodes
    ]
    return tuple(called), given


def _literal(value: Any, numbers: dict[Node, Any]) -> str:
    return repr(map_arg(value, lambda node: numbers[node]))


def _value(node: Node) -> Any:
    return node_value_key(node.meta.get("val"))


def repeated_calls(gm: GraphModule, known: Collection[Hashable] = ()) -> Iterator[list[Region]]:
    """Groups of calls of sibling modules, of which at least two compute the same: the outermost such groups.

    Siblings are also a group if one of them asks for checkpointing, or has one of the `known` signatures.
    """
    order = [n for n in gm.graph.nodes if n.op == "call_function" and not is_size(n) and not is_of_block(n)]
    yield from _repeated_calls(gm, order, {node: i for i, node in enumerate(order)}, 0, known)


def is_size(node: Node) -> bool:
    """Whether a node is an operator that gives a number, as a size is, and no tensor."""
    return isinstance(node.meta.get("val"), _NUMBERS) and node.op == "call_function"


def _repeated_calls(
    gm: GraphModule, nodes: Sequence[Node], position: dict[Node, int], depth: int, known: Collection[Hashable]
) -> Iterator[list[Region]]:
    parents: dict[str, dict[str, list[Node]]] = {}
    for node in nodes:
        paths = _numbered(node)
        if len(paths) > depth:
            parent = paths[depth].partition("@")[0].rpartition(".")[0]
            parents.setdefault(parent, {}).setdefault(paths[depth], []).append(node)
    for members in parents.values():
        calls = [
            Region(call.partition("@")[0], found) for call, every in members.items() for found in _runs(every, position)
        ]
        whole = all(_is_whole(gm, region, position) for region in calls)
        asked = any(asks_for_checkpointing(gm.get_submodule(region.path)) for region in calls)
        signatures = {region.signature() for region in calls} if whole else set()
        if whole and (asked or len(signatures) < len(calls) or not signatures.isdisjoint(known)):
            yield calls
        else:
            for region in calls:
                yield from _repeated_calls(gm, region.nodes, position, depth + 1, known)


def _numbered(node: Node) -> list[str]:
    """The calls that a node is part of, outermost first, of modules that have a number for a name."""
    stack = node.meta.get("nn_module_stack") or {}
    return [path for path, _ in stack.values() if path.partition("@")[0].rpartition(".")[2].isdigit()]


def _runs(nodes: list[Node], position: dict[Node, int]) -> list[tuple[Node, ...]]:
    """A module's nodes, split into its calls: each run of neighbours is one if all are equally long, else all are."""
    runs: list[list[Node]] = []
    for node in nodes:
        if not runs or position[node] != position[runs[-1][-1]] + 1:
            runs.append([])
        runs[-1].append(node)
    return list(map(tuple, runs)) if len(set(map(len, runs))) == 1 else [tuple(nodes)]


def _is_whole(gm: GraphModule, region: Region, position: dict[Node, int]) -> bool:
    """Whether a region has three nodes or more, nothing else between them, and reads no other module's parameters."""
    first, last = position[region.nodes[0]], position[region.nodes[-1]]
    foreign = (node for node in region.inputs if node.op == "get_attr")
    borrowed = any(isinstance(find_tensor(gm, str(node.target)), torch.nn.Parameter) for node in foreign)
    return len(region.nodes) > 2 and last - first + 1 == len(region.nodes) and not borrowed
