"""restore_causal: an attention mask that depends on sizes alone, and is causal or masks nothing, is left out.

sdpa(q, k, v, tril(ones))  ->  sdpa(q, k, v, is_causal=True)        sdpa(q, k, v, ones)  ->  sdpa(q, k, v)

Models make their masks by comparing positions, in many ways, so a mask is not recognised by its operators: it is
computed, at small sizes and at sizes around every integer that its operators mention (where a sliding window begins to
show). What stays: masks that depend on data (padding, packed sequences, static caches), windows, and masks that do more
with positions than to add and compare them (`lorafx/graph/masks/positions.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lorafx.graph import Match, Provenance, Rule, fake_mode_of
from lorafx.graph.blocks import LAYERS, block_calls, blocks_of
from lorafx.graph.effects import drop_dead
from lorafx.graph.masks.positions import integers
from lorafx.graph.masks.sizes import AtSizes, DependsOnData, apart, is_written_to, symbols_of, together
from lorafx.graph.modules import copied
from lorafx.graph.outline import keep_block, list_layers, run_instead
from lorafx.pipeline import Context, Pass

aten = torch.ops.aten
LARGEST = 2**13  # no mask of more rows is computed
FEW = 64  # masks of fewer rows are tried at two values of the sizes that are not their own, such as the batch's
At = Callable[[Callable[[object], int]], AtSizes]


def masked(q, k, v, mask, dropout, scale, gqa):
    return aten.scaled_dot_product_attention.default(q, k, v, mask, dropout, False, scale=scale, enable_gqa=gqa)


def causal(q, k, v, dropout, scale, gqa):
    return aten.scaled_dot_product_attention.default(q, k, v, None, dropout, True, scale=scale, enable_gqa=gqa)


def unmasked(q, k, v, dropout, scale, gqa):
    return aten.scaled_dot_product_attention.default(q, k, v, None, dropout, False, scale=scale, enable_gqa=gqa)


def _has_mask(found: Match) -> str | None:
    return None if isinstance(found.bindings["mask"], Node) else "there is no mask"


CAUSAL, UNMASKED = Rule(masked, causal, _has_mask), Rule(masked, unmasked, _has_mask)
Rules = tuple[Rule | None, ...]


@dataclass(frozen=True)
class RestoreCausal(Pass):
    """Afterwards no mask of `scaled_dot_product_attention` that depends on sizes alone is causal or masks nothing."""

    exact = True
    requires = frozenset({"canonical"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        if LAYERS in gm.meta:
            return 0  # a block's masks come from the graph that runs it, and are rewritten with that
        rules = [_rule(lambda symbols: AtSizes(gm, symbols), found) for found in _masked(gm)]
        count = self._apply(gm, rules) + sum(self._rewrite_block(gm, block) for block in blocks_of(gm))
        if count:
            list_layers(gm)
            drop_dead(gm)
        return count

    def _rewrite_block(self, gm: GraphModule, block: GraphModule) -> int:
        """Rewrite a block; layers that run it on masks of different kinds get a block for each kind."""
        attentions, kinds = _masked(block), defaultdict[Rules, list[Node]](list)
        if not attentions:
            return 0
        inputs = block.graph.find_nodes(op="placeholder")
        decisive = _upstream(found.bindings["mask"] for found in attentions)
        known: dict[tuple[object, ...], Rules] = {}
        for call in [call for call, other, _ in block_calls(gm) if other is block]:
            given = dict(zip(inputs, call.args[2:], strict=True))
            masks = tuple(value for node, value in given.items() if node in decisive)
            if masks not in known:
                at = _at_layer(block, given, gm)
                known[masks] = tuple([_rule(at, found) for found in attentions])
            kinds[known[masks]].append(call)
        parts = [block, *(_copy(gm, block, calls) for calls in list(kinds.values())[1:])]
        return sum(self._apply(part, rules, calls) for part, (rules, calls) in zip(parts, kinds.items()))

    def _apply(self, gm: GraphModule, rules: Iterable[Rule | None], calls: list[Node] | None = None) -> int:
        """Rewrite the attentions of a graph, or of a block that these calls run."""
        mode, pairs = fake_mode_of(gm), [(rule, found) for rule, found in zip(rules, _masked(gm)) if rule]
        for rule, found in pairs:
            rule.apply(gm, found, Provenance(self.name), mode)
        if pairs and calls is not None:
            drop_dead(gm)
            unused = [n for n, node in enumerate(gm.graph.find_nodes(op="placeholder")) if not node.users]
            for call in calls:  # so that the mask is not computed for it
                call.args = tuple([None if n - 2 in unused else value for n, value in enumerate(call.args)])
        return len(pairs) * (1 if calls is None else len(calls))


def _masked(gm: GraphModule) -> list[Match]:
    """The attentions with a mask."""
    nodes = gm.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    return [found for node in nodes if isinstance(found := CAUSAL.find(node), Match)]


def _upstream(nodes: Iterable[Node]) -> set[Node]:
    """These nodes and all that they depend on."""
    pending, found = list(nodes), set[Node]()
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def _copy(gm: GraphModule, block: GraphModule, calls: list[Node]) -> GraphModule:
    """A copy of a block, for these calls to run."""
    layer = gm.get_submodule(str(calls[0].args[1].target))  # type: ignore[union-attr]
    copy = keep_block(gm, copied(block, layer))
    for call in calls:
        run_instead(call, copy)
    return copy


def _at_layer(block: GraphModule, given: dict[Node, object], outer: GraphModule) -> At:
    return lambda symbols: AtSizes(block, symbols, given, AtSizes(outer, symbols))


def _rule(at: At, found: Match) -> Rule | None:
    """The rule by which an attention can do without its mask, if there is one."""
    mask: Node = found.bindings["mask"]
    sizes = mask.meta["val"].shape[-2:]
    rules = {CAUSAL, UNMASKED} if _is_of_all_pairs(found) else {UNMASKED}
    try:
        first = at(together(sizes, 3))
        rules &= _rules_for(first(mask))
        if is_written_to(first):
            return None
        for size in _telling_sizes(integers(first)) if symbols_of(mask.meta["val"].shape) else ():
            for others in (2, 7) if size < FEW else (2,):
                rules &= _rules_at(at, together(sizes, size, others), mask) if rules and size <= LARGEST else set()
                with suppress(RuntimeError, IndexError):  # where sizes do not fit, the graph does not run either
                    rules &= _rules_at(at, apart(sizes, size, others), mask) if rules else set()
    except (DependsOnData, RuntimeError, IndexError):
        return None
    return next((rule for rule in (UNMASKED, CAUSAL) if rule in rules), None)


def _rules_at(at: At, symbols: Callable[[object], int], mask: Node) -> set[Rule]:
    """The rules that fit a mask at these sizes. Raises `DependsOnData` if it is not made of positions alone there."""
    ran = at(symbols)
    rules = _rules_for(ran(mask))
    integers(ran)
    return rules


def _is_of_all_pairs(found: Match) -> bool:
    """Whether a mask has a row for each query and a column for each key, and is not broadcast."""
    q, k, mask = (found.bindings[name].meta["val"].shape for name in ("q", "k", "mask"))
    return len(mask) > 1 and [str(size) for size in mask[-2:]] == [str(q[-2]), str(k[-2])]


def _telling_sizes(integers: set[int]) -> list[int]:
    around = {n + step for n in integers for step in (-1, 0, 1)}
    return sorted({2, 5, *(n for n in around if n > 1), 2 * sum(integers) + 3})


def _rules_for(mask: Tensor) -> set[Rule]:
    """The rules that fit a mask with these values."""
    if not mask.is_floating_point() and mask.dtype != torch.bool:
        return set()
    keep = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not (keep | (mask <= torch.finfo(mask.dtype).min)).all():
        return set()
    rules = {UNMASKED} if keep.all() else set()
    if mask.ndim > 1 and (keep == torch.ones(mask.shape[-2:], dtype=torch.bool).tril()).all():
        rules.add(CAUSAL)
    return rules
