"""merge_adapters: the inverse of insert_adapters, for adapters whose ΔW lies in the base weights already.

The rule is the insertion's, run backwards: the kind's equation becomes the base operator again, because
x (W + ΔW)ᵀ = x Wᵀ + update. `lorafx.merging.ledger` writes W + ΔW into the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from lorafx.adapters.adapter import Adapter
from lorafx.errors import VerifyError, user_line
from lorafx.graph import ADAPTED_BY, SITE, Match, Provenance, fake_mode_of, made_by
from lorafx.pipeline.pipeline import Context, Pass
from lorafx.torch_private.graphs import is_erased

from .insert_adapters import rules


@dataclass(frozen=True)
class MergeAdapters(Pass):
    """Afterwards no equation of a merged adapter is left in the graph."""

    requires = frozenset({"adapters"})
    establishes = frozenset({"merged"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        count = 0
        for adapter in (a for a in context.adapters if a.name in context.merged):
            for node in reversed(list(gm.graph.nodes)):
                count += not is_erased(node) and _revert(gm, node, adapter)
        _require_gone(gm, context.merged)
        return count


def _require_gone(gm: GraphModule, merged: frozenset[str]) -> None:
    """A merged adapter that still acted in the graph would act twice."""
    for node in gm.graph.nodes:
        maker = made_by(node)
        if maker and maker.adapter in merged and node.op != "get_attr":
            raise VerifyError(f"{maker.adapter!r} is merged and still acts at {maker.site} [{user_line(node)}]")


def _revert(gm: GraphModule, node: Node, adapter: Adapter) -> bool:
    """Undo the insertion whose result is `node`, if it is one of this adapter's."""
    maker = made_by(node)
    if maker is None or maker.adapter != adapter.name or maker.site not in adapter.selection:
        return False
    site = adapter.selection.by_name[maker.site]
    for rule in rules(site, adapter):
        found = rule.reversed().find(node)
        if isinstance(found, Match):
            where = Provenance(MergeAdapters.name, site.name)
            marks = next(n.meta[ADAPTED_BY] for n in found.nodes if ADAPTED_BY in n.meta)
            base, _ = rule.reversed().apply(gm, found, where, fake_mode_of(gm))
            base.meta[SITE] = site
            base.meta[ADAPTED_BY] = tuple(name for name in marks if name != adapter.name)
            return True
    return False
