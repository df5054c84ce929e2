"""Rules, the unit of rewriting: a pattern, a replacement, and a check."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..torch_private.graphs import is_erased
from ..torch_private.tracing import FakeTensorMode
from .emit import Provenance, emit, marks_of
from .emit import made_by as maker_of
from .match import Match, NoMatch, Pattern, match, trace_function
from .values import fake_mode_of
from .writes import interrupted


def always(found: Match) -> str | None:
    """The check of a rule that needs none."""
    return None


@dataclass(frozen=True)
class Rule:
    """`pattern` becomes `replacement` where `check` allows it.

    Both are plain functions over `torch.ops.aten` that share argument names; names that occur only in the replacement
    are given to `apply` as `fresh`. `check` returns the reason to refuse a match, or None. A match is also refused if
    some node writes to a tensor between its first node and its last.
    """

    pattern: Pattern
    replacement: Pattern
    check: Callable[[Match], str | None] = always

    def reversed(self) -> Rule:
        """The rule that undoes this one, with the same check, which may use only names that both sides have."""
        return Rule(self.replacement, self.pattern, self.check)

    def find(self, anchor: Node) -> Match | NoMatch:
        """The match whose result is `anchor`, or why there is none."""
        found = match(self.pattern, anchor)
        if isinstance(found, Match) and (reason := self.check(found)):
            return NoMatch(anchor, reason)
        if isinstance(found, Match) and interrupted(found):
            return NoMatch(anchor, "something is written to between its first line and its last")
        return found

    def apply(
        self,
        gm: GraphModule,
        found: Match,
        provenance: Provenance,
        mode: FakeTensorMode,
        fresh: dict[str, Any] | None = None,
    ) -> tuple[Node, tuple[Node, ...]]:
        """Rewrite one match. Returns the node that computes the result now, and all new nodes."""
        return emit(gm, found, self.replacement, fresh or {}, provenance, mode)

    def apply_everywhere(self, gm: GraphModule, made_by: str) -> int:
        """Rewrite every match, last first, and return how many; nodes that this writes are not matched again.

        New nodes take over the site and adapter of the node that they replace, the new result also its `marks_of`.
        """
        count, mode = 0, fake_mode_of(gm)
        for anchor in reversed(self._anchors(gm)):
            if is_erased(anchor):
                continue
            found = self.find(anchor)
            if isinstance(found, Match):
                before, marks = maker_of(anchor) or Provenance(made_by), marks_of(anchor)
                result, new = self.apply(gm, found, Provenance(made_by, before.site, before.adapter), mode)
                if result in new:
                    result.meta |= marks
                count += 1
        return count

    def _anchors(self, gm: GraphModule) -> list[Node]:
        """The nodes at which the pattern may have its result, in order."""
        result = trace_function(self.pattern).output_node().args[0]
        if not isinstance(result, Node) or result.op == "placeholder":
            return list(gm.graph.nodes)
        return list(gm.graph.find_nodes(op=result.op, target=result.target))


def rewrite_updates(rules: Iterable[Rule], gm: GraphModule, made_by: str) -> int:
    """Rewrite each sum `base + update` by the first of these rules that applies, last first, and return how many.

    The base is what a site's operator gives: the new result takes over its marks, and new nodes the sum's site.
    """
    mode, count = fake_mode_of(gm), 0
    for total in reversed(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)):
        if applies := first_match(rules, total):
            rule, found = applies
            maker, marks = maker_of(total) or Provenance(made_by), marks_of(total.args[0])  # type: ignore[arg-type]
            result, _ = rule.apply(gm, found, Provenance(made_by, maker.site, maker.adapter), mode)
            result.meta |= marks
            count += 1
    return count


def first_match(rules: Iterable[Rule], anchor: Node) -> tuple[Rule, Match] | None:
    """The first rule that applies at a node, and its match."""
    for rule in rules:
        if isinstance(found := rule.find(anchor), Match):
            return rule, found
    return None
