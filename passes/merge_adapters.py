"""merge_adapters: the inverse of insert_adapters, for adapters that are merged into the base weights.

before(x) -> x        after(y, x) -> y

The rules are those of insertion, reversed: the operator gives x W'ᵀ, which is what the equation makes of x Wᵀ, so the
equation goes. `merging/ledger.py` writes W' into the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Graph, GraphModule, Node

from lorafx.adapters.adapter import Adapter
from lorafx.adapters.equation import Equation
from lorafx.errors import VerifyError, user_line
from lorafx.graph import ADAPTED_BY, Match, Provenance, Rule, fake_mode_of, made_by
from lorafx.pipeline import Context, Pass
from lorafx.torch_private.graphs import is_erased


def what_went_in(x):
    return x


def what_came_out(y):
    return y


@dataclass(frozen=True)
class MergeAdapters(Pass):
    """Afterwards no equation of a merged adapter is left in the graph."""

    requires = frozenset({"adapters"})
    establishes = frozenset({"merged"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        count = 0
        for adapter in (a for a in context.adapters if a.name in context.merged):
            rules = {site.name: _rules(gm, adapter, site.name) for site in adapter.selection}
            for node in reversed(list(gm.graph.nodes)):
                maker = made_by(node)
                if not is_erased(node) and maker and maker.adapter == adapter.name and maker.site in rules:
                    count += _undo(gm, node, rules[maker.site])
            for node in gm.graph.nodes:
                if adapter.name in node.meta.get(ADAPTED_BY, ()):
                    node.meta[ADAPTED_BY] = tuple(name for name in node.meta[ADAPTED_BY] if name != adapter.name)
        _require_gone(gm, context.merged)
        return count


def _rules(gm: GraphModule, adapter: Adapter, name: str) -> list[Rule]:
    """A rule for each insertion that may have been made at a site, to undo it."""
    equations = list(Equation.all_at(gm, adapter, adapter.selection.by_name[name]))
    afters = [(equation.after(), what_came_out) for equation in equations]
    befores = [(equation.before(), what_went_in) for equation in equations]
    return [Rule(graph, gone) for graph, gone in afters + befores if _computes(graph)]


def _computes(graph: Graph) -> bool:
    """Whether an equation's graph has an operator: most kinds do nothing before the base operator, or nothing after."""
    return any(node.op == "call_function" for node in graph.nodes)


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
