"""match_targets: find where the graph reads the selected weights.

A read is known by the parameter itself, not by its name, so tied weights and modules that run more than once are found
wherever they are used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from lorafx.adapters.equation import patterns
from lorafx.adapters.site import Site
from lorafx.adapters.storages import DENSE
from lorafx.errors import CaptureError, UncoveredOperatorError, user_line
from lorafx.graph import SITE, Match, Provenance, describe, fake_mode_of, match, resolve, within_vmap
from lorafx.pipeline import Context, Pass

VALUE = torch.ops.aten.alias.default


@dataclass(frozen=True)
class MatchTargets(Pass):
    """Afterwards every node that reads a selected weight carries its site in `meta["site"]`.

    A parameter that a config names may be read by any operator: where no reading covers that, one operator before it
    reads the whole of the parameter. Raises `UncoveredOperatorError` if any other weight is read by an operator that no
    reading or storage covers.
    Raises `CaptureError` if the graph returns the weight, or reads it within a vmap or an operator that has a graph of
    its own: such calls can run by sites. A site that the call does not run is no error.
    """

    exact = True
    requires = frozenset({"canonical"})
    establishes = frozenset({"sites"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        sites = context.sites_by_weight(gm)
        count = 0
        for node in gm.graph.find_nodes(op="get_attr"):
            site = sites.get(id(resolve(gm, node.target)))
            if site is not None:
                count += sum(_mark(user, node, site, gm) for user in tuple(node.users))
        return count


def _mark(user: Node, weight: Node, site: Site, gm: GraphModule) -> int:
    if user.target is torch.ops.aten.sym_size.int:
        return 0  # a size is the same with and without the adapter
    for pattern in patterns(site).values():
        for anchor in _made_of(user, _depth(pattern)):
            found = match(pattern, anchor)
            if isinstance(found, Match) and found.bindings["weight"] is weight and _reads_once(found, weight):
                if within_vmap(anchor):
                    raise CaptureError(f"site {site.name}: its weight is read within a vmap [{user_line(user)}]")
                anchor.meta[SITE] = site
                return 1
    if isinstance(user.target, torch._ops.HigherOrderOperator) or user.op == "output":
        inside = "returned" if user.op == "output" else f"read inside {user.target}, which is a graph of its own"
        raise CaptureError(f"site {site.name}: its weight is {inside} [{user_line(user)}]")
    if site.is_parameter and site.reading.value:
        return _give_value(user, weight, site, gm)
    known = ", ".join(operator.pattern.__name__ for operator in patterns(site))
    if site.storage != DENSE:
        known += f", on what the storage {site.storage} says that its dense weight is computed by"
    raise UncoveredOperatorError(
        f"site {site.name}: its weight is read by {user.target}, which no reading covers [{user_line(user)}]. "
        f"Exclude the module (`exclude_modules`), or select one whose weight is read as {known}."
    )


def _give_value(user: Node, weight: Node, site: Site, gm: GraphModule) -> int:
    """Have an operator that no reading covers be given what reads the whole weight, which is marked instead."""
    others = (other for other in weight.users if other.target is VALUE and SITE in other.meta and other < user)
    whole, count = next(others, None), 0
    if whole is None:
        with gm.graph.inserting_before(user):
            whole = gm.graph.call_function(VALUE, (weight,))
        describe(whole, user, Provenance(MatchTargets.name, site.name), gm, fake_mode_of(gm))
        whole.meta[SITE], count = site, 1
    user.replace_input_with(weight, whole)
    return count


def _depth(pattern: Graph) -> int:
    """How many operators a pattern has on the longest way from the weight to its result."""
    depths: dict[Node, int] = {}
    for node in pattern.nodes:
        above = [depths[given] for given in node.all_input_nodes if given in depths]
        if node.target == "weight" or above:
            depths[node] = 1 + max(above, default=-1)
    return depths[pattern.output_node()] - 1


def _made_of(user: Node, depth: int) -> Iterator[Node]:
    """The node `user`, its users, and so on for `depth` levels: where a pattern's result may be."""
    level = {user: None}
    for _ in range(depth):
        yield from level
        level = {following: None for node in level for following in node.users}


def _reads_once(found: Match, weight: Node) -> bool:
    """Whether the weight is the operator's weight alone, and not its input too."""
    return sum(value is weight for value in found.bindings.values()) == 1
