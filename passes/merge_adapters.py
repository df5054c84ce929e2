"""merge_adapters: the inverse of insert_adapters, for adapters that are merged into the base weights.

before(x) -> x        after(y, x) -> y

The rules are those of insertion, reversed: the operator gives x W'ᵀ, which is what the equation makes of x Wᵀ, so the
equation goes. `merging/ledger.py` writes W' into the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.fx import GraphModule, Node

from lorafx.adapters.adapter import Adapter
from lorafx.adapters.equation import Equation
from lorafx.errors import VerifyError, user_line
from lorafx.graph import ADAPTED_BY, SITE, Attribute, Match, Provenance, Rule, fake_mode_of, made_by
from lorafx.pipeline import Context, Pass
from lorafx.torch_private.graphs import is_erased
from lorafx.tree.lookup import tensor_at


def what_went_in(x):
    return x


def what_came_out(y):
    return y


@dataclass(frozen=True)
class MergeAdapters(Pass):
    """Afterwards no equation of a merged adapter is left in the graph."""

    exact = True
    requires = frozenset({"adapters"})
    establishes = frozenset({"merged"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        count = 0
        for adapter in (a for a in context.adapters if a.name in context.merged):
            rules = _rules(gm, adapter)
            for node in reversed(list(gm.graph.nodes)):
                maker = made_by(node)
                if not is_erased(node) and maker and maker.adapter == adapter.name and maker.site in rules:
                    count += _undo(gm, node, rules[maker.site])
            for node in gm.graph.nodes:
                if adapter.name in node.meta.get(ADAPTED_BY, ()):
                    node.meta[ADAPTED_BY] = tuple(name for name in node.meta[ADAPTED_BY] if name != adapter.name)
        _require_gone(gm, context.merged)
        return count


def _rules(gm: GraphModule, adapter: Adapter) -> dict[str, list[Rule]]:
    """The rules that undo the adapter's insertions, by the site's name."""
    rules: dict[str, list[Rule]] = {}
    by_weight, known = adapter.sites_by_weight(gm), set()
    for base in gm.graph.nodes:
        if adapter.name in base.meta.get(ADAPTED_BY, ()):
            site = by_weight[id(tensor_at(gm, base.meta[SITE].weight))]
            equation, _ = Equation.at(gm, base, adapter, site)
            for own in (True, False):  # the bias may have been replaced since, which is what tells
                inserted = site.name, equation.operator, own
                if inserted not in known:
                    known.add(inserted)
                    rules.setdefault(site.name, []).extend(_undoing(replace(equation, own=own)))
    return rules


def _undoing(equation: Equation) -> Iterator[Rule]:
    """The rules that take an equation away. Most kinds have nothing to do before, or after, the operator."""
    given = equation.given(None, dict.fromkeys(equation.bound))
    paths = {name: value.path for name, value in given.items() if isinstance(value, Attribute)}

    def reads_its_tensors(found: Match) -> str | None:
        others = (name for name, path in paths.items() if name in found.bindings and _read(found, name) != path)
        return next((f"{name} is another tensor" for name in others), None)

    for graph, gone in ((equation.after(), what_came_out), (equation.before(), what_went_in)):
        if any(node.op == "call_function" for node in graph.nodes):
            yield Rule(graph, gone, reads_its_tensors)


def _read(found: Match, name: str) -> str:
    """The path of the tensor that a name stands for, cast or not; empty for what is no tensor of the tree."""
    node = found.bindings[name]
    if isinstance(node, Node) and node.target is torch.ops.aten.to.dtype:
        node = node.args[0]
    return str(node.target) if isinstance(node, Node) and node.op == "get_attr" else ""


def _undo(gm: GraphModule, node: Node, rules: list[Rule]) -> bool:
    """Undo the insertion whose result is `node`, if it is one."""
    for rule in rules:
        found = rule.find(node)
        if isinstance(found, Match):
            rule.apply(gm, found, Provenance(MergeAdapters.name), fake_mode_of(gm))
            return True
    return False


def _require_gone(gm: GraphModule, merged: frozenset[str]) -> None:
    """Raise `VerifyError` if a merged adapter still acts in the graph: it would act twice."""
    for node in gm.graph.nodes:
        maker = made_by(node)
        if maker and maker.adapter in merged and node.op != "get_attr":
            raise VerifyError(f"{maker.adapter!r} is merged and still acts at {maker.site} [{user_line(node)}]")
