"""insert_adapters: the adapter's equation takes the place of the base operator, at every site.

The pattern is a site form's (`lorafx.forms`), the replacement is the kind's equation on the same argument names
(`lorafx.kinds`); the names that only the equation has become reads of the adapter's tensors, and numbers. The inverse
is `merge_adapters`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

from lorafx.adapter import Adapter
from lorafx.forms import FORMS
from lorafx.pipeline import Context, Pass
from lorafx.rewrite import ADAPTED_BY, SITE, Attribute, Match, Provenance, Rule, describe, fake_mode_of
from lorafx.sites import Site
from lorafx.tree import find_tensor, tensor_at


@dataclass(frozen=True)
class InsertAdapters(Pass):
    """Afterwards every marked node is the active adapters' equation, the first adapter's update innermost.

    Biases and modules that an adapter trains as a whole are read from its own copies.
    """

    requires = frozenset({"sites"})
    establishes = frozenset({"adapters"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        mode, count = fake_mode_of(gm), 0
        for node in [node for node in gm.graph.nodes if SITE in node.meta]:
            site = node.meta[SITE]
            for adapter in reversed([a for a in context.adapters if site in a.selection]):
                node = _insert(gm, node, site, adapter, mode)
                count += 1
        for adapter in context.adapters:
            count += _read_own_copies(gm, adapter, mode)
        return count


def rules(site: Site, adapter: Adapter) -> list[Rule]:
    """The insertion at a site, one rule for each way its weight may be read."""
    readable = [pattern for form in FORMS for pattern in form.patterns if _can_read(site, form)]
    return [Rule(pattern, adapter.kind.equation(site, pattern)) for pattern in readable]


def _can_read(site: Site, form: Any) -> bool:
    return form == site.form or (bool(site.tied) and form.name in ("linear", "embedding"))


def _insert(gm: GraphModule, node: Node, site: Site, adapter: Adapter, mode: FakeTensorMode) -> Node:
    """Insert one adapter at one node; returns the node that is the base operator now."""
    found, rule = next((m, rule) for rule in rules(site, adapter) if isinstance(m := rule.find(node), Match))
    where, target = Provenance(InsertAdapters.name, site.name, adapter.name), node.target
    _, new = rule.apply(gm, found, where, mode, _fresh(gm, site, adapter, node))
    base = next(n for n in new if n.target is target and found.bindings["weight"] in n.args)
    base.meta[SITE] = site
    base.meta[ADAPTED_BY] = (adapter.name, *node.meta.get(ADAPTED_BY, ()))
    return base


def _fresh(gm: GraphModule, site: Site, adapter: Adapter, node: Node) -> dict[str, Any]:
    paths = adapter.tensors[site.name]
    names = adapter.kind.names(site, adapter.config)
    tensors = {name: suffix and Attribute(paths[suffix]) for name, suffix in names.items()}
    first = gm.get_parameter(next(iter(paths.values())))
    return {
        **tensors,
        **adapter.kind.scalars(site, adapter.config),
        "training": gm.get_submodule(site.name).training,
        "dtype": first.dtype,
        "result_dtype": node.meta["val"].dtype,
    }


def _read_own_copies(gm: GraphModule, adapter: Adapter, mode: FakeTensorMode) -> int:
    """Send the reads of replaced base tensors to the adapter's copies."""
    copies = {id(tensor_at(gm, base)): (base, copy) for base, copy in adapter.replaced.items()}
    names = Counter(id(p) for _, p in gm.named_parameters(remove_duplicate=False)) if copies else Counter()
    count = 0
    for node in gm.graph.find_nodes(op="get_attr"):
        tensor = id(find_tensor(gm, node.target))
        base, copy = copies.get(tensor, ("", ""))
        users = [user for user in node.users if copy and (names[tensor] <= 1 or _is_within(user, node, base))]
        if users:
            _redirect(gm, node, users, copy, Provenance(InsertAdapters.name, base, adapter.name), mode)
            count += len(users)
    return count


def _redirect(
    gm: GraphModule, node: Node, users: list[Node], path: str, provenance: Provenance, mode: FakeTensorMode
) -> None:
    with gm.graph.inserting_before(node):
        own = gm.graph.get_attr(path)
    describe(own, users[0], provenance, gm, mode)
    for user in users:
        user.replace_input_with(node, own)
    if not node.users:
        gm.graph.erase_node(node)


def _is_within(user: Node, read: Node, base: str) -> bool:
    """Whether a read of a tied tensor is made by the module that owns the name `base`, and not by its twin."""
    owner = base.rpartition(".")[0]
    innermost = [path.partition("@")[0] for path, _ in user.meta.get("nn_module_stack", {}).values()][-1:]
    return innermost == [owner] or (read.target == base and any(owner.startswith(path) for path in innermost))
