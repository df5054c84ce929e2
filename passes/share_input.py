"""share_input: adapted linears that read one value become one operator, which reads it once for all small products.

    lora_linear(x, Wq, …), lora_linear(x, Wk, …), …   ->   lora_linears(x, [Wq, Wk, …], …)
    own_lora_linear(x, …), own_lora_linear(x, …), …   ->   own_lora_linears(x, …)

They are found by what they read, not by name: queries, keys and values; gate and up; any number. Those with a dropout
of their own read different values. Adapter tensors stay separate parameters.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from lorafx import ops  # noqa: F401, defines torch.ops.lorafx
from lorafx.graph import Provenance, arguments, describe, fake_mode_of, made_by, marks_of, within_vmap, writes
from lorafx.pipeline import Context, Pass
from lorafx.torch_private.graphs import name_of

_own = torch.ops.lorafx
# What becomes of an operator for one layer, and its arguments after x, by name: those that lists are made of.
JOINT = {
    _own.lora_linear.default: (_own.lora_linears.default, ("weight", "bias", "lora_A", "lora_B", "scaling")),
    _own.own_lora_linear.default: (
        _own.own_lora_linears.default,
        ("bias", "number", "features", "z", "lora_A", "lora_B", "scaling"),
    ),
}


@dataclass(frozen=True)
class ShareInput(Pass):
    """Afterwards no two adapted linears read the same value, unless with a dropout, or with a write in between."""

    exact = True
    requires = frozenset({"adapters"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        groups = [group for group in _groups(gm) if len(group) > 1]
        for group in groups:
            self._join(gm, group)
        return len(groups)

    def _join(self, gm: GraphModule, group: list[Node]) -> None:
        mode, first = fake_mode_of(gm), group[0]
        each = [arguments(node) for node in group]
        several, names = JOINT[first.target]  # type: ignore[index]
        roles = [None if role == "z" else [given[role] for given in each] for role in names]
        for read in dict.fromkeys(read for node in group for read in _reads(node) or ()):
            if first < read:
                first.prepend(read)
        maker = made_by(first) or Provenance(self.name)
        with gm.graph.inserting_before(first):
            joint = gm.graph.create_node("call_function", several, (each[0]["x"], *roles), {}, name_of(several))
            describe(joint, first, Provenance(self.name, "", maker.adapter), gm, mode)
            for place, node in enumerate(group):
                made = made_by(node) or maker
                part = gm.graph.call_function(operator.getitem, (joint, place))
                describe(part, node, Provenance(self.name, made.site, made.adapter), gm, mode)
                part.meta |= marks_of(node)
                node.replace_all_uses_with(part)
        for node in group:
            gm.graph.erase_node(node)


def _groups(gm: GraphModule) -> Iterator[list[Node]]:
    """Adapted linears that read one value, with nothing written in between."""
    groups: dict[tuple[Any, Node], list[Node]] = defaultdict(list)
    for node in gm.graph.nodes:
        if writes(node, gm):
            yield from groups.values()
            groups.clear()
        if node.target in JOINT and _is_plain(node) and not within_vmap(node) and _reads(node) is not None:
            groups[node.target, arguments(node)["x"]].append(node)
    yield from groups.values()


def _is_plain(node: Node) -> bool:
    """Whether an adapted linear has no dropout, and leaves the order of its products as it is."""
    given = arguments(node)
    return given["z"] is None and not given["dropout"]


def _reads(node: Node) -> list[Node] | None:
    """What a node reads besides x, in order: parameters, and values computed from parameters alone.

    These may be computed earlier than they are. None if the node reads anything else.
    """
    x = arguments(node)["x"]
    found: dict[Node, None] = {}
    pending = [read for read in node.all_input_nodes if read is not x]
    while pending:
        read = pending.pop()
        if read.op not in ("get_attr", "call_function"):
            return None
        found[read] = None
        pending += read.all_input_nodes
    return sorted(found) if all(read.op == "get_attr" or read.all_input_nodes for read in found) else None
