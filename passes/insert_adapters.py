"""insert_adapters: the adapter's equation takes the place of the base operator, at every site.

The pattern is a site form's (`adapters/readings.py`), the replacement is the kind's equation on the same argument names
(`adapters/kinds/`); the names that only the equation has become reads of the adapter's tensors, and numbers. The
inverse is `merge_adapters`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from lorafx.adapters.adapter import Adapter
from lorafx.adapters.readings import CONVOLUTIONS, FORMS
from lorafx.adapters.selection import Site
from lorafx.errors import ConfigError, UncoveredOperatorError, user_line
from lorafx.graph import ADAPTED_BY, SITE, Attribute, Match, Provenance, Rule, describe, fake_mode_of, first_match
from lorafx.pipeline.pipeline import Context, Pass
from lorafx.torch_private.tracing import FakeTensorMode
from lorafx.tree.lookup import find_tensor, tensor_at


@dataclass(frozen=True)
class InsertAdapters(Pass):
    """Afterwards every marked node is the active adapters' equation, the first adapter's update innermost.

    An update is computed in the dtype of what the base operator is given, whatever dtype the adapter's parameters are
    kept in, as under autocast; or in `compute_dtype`, by name, as "float32". Biases and modules that an adapter trains
    as a whole are read from its own copies.
    """

    compute_dtype: str | None = None

    requires = frozenset({"sites"})
    establishes = frozenset({"adapters"})

    def __post_init__(self) -> None:
        dtype = getattr(torch, self.compute_dtype or "float32", None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ConfigError(
                f"{self.compute_dtype!r} is no dtype to compute in; choose one as 'float32' or 'bfloat16'"
            )

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        mode, count = fake_mode_of(gm), 0
        sites = [(adapter, adapter.sites_by_weight(gm)) for adapter in reversed(context.adapters)]
        for node in [node for node in gm.graph.nodes if SITE in node.meta]:
            weight = id(tensor_at(gm, node.meta[SITE].weight))
            for adapter, by_weight in sites:
                if weight in by_weight:
                    node = self._insert(gm, node, by_weight[weight], adapter, mode)
                    count += 1
        for adapter in context.adapters:
            count += _read_own_copies(gm, adapter, mode)
        return count

    def _insert(self, gm: GraphModule, node: Node, site: Site, adapter: Adapter, mode: FakeTensorMode) -> Node:
        """Insert one adapter at one node; returns the node that is the base operator now."""
        rule, found = _insertion(node, site, adapter)
        where = Provenance(self.name, site.name, adapter.name)
        fresh = _fresh(gm, site, adapter, node, self._dtype(found), _reads_own_bias(gm, found, site))
        _, new = rule.apply(gm, found, where, mode, fresh)
        base = next(n for n in new if _is_base(rule, n, found.bindings["weight"]))
        base.meta[SITE] = site
        base.meta[ADAPTED_BY] = (adapter.name, *node.meta.get(ADAPTED_BY, ()))
        return base

    def _dtype(self, found: Match) -> torch.dtype | None:
        """The dtype of an update; None for an embedding's, which is looked up in the adapter's own."""
        if "x" not in found.bindings:
            return None
        return getattr(torch, self.compute_dtype) if self.compute_dtype else found.bindings["x"].meta["val"].dtype


def _insertion(node: Node, site: Site, adapter: Adapter) -> tuple[Rule, Match]:
    if applies := first_match(rules(site, adapter), node):
        return applies
    raise UncoveredOperatorError(
        f"site {site.name}: its weight is read by {node.target}, in which no adapter of its shape acts "
        f"[{user_line(node)}]. Exclude the module (`exclude_modules`)."
    )


def rules(site: Site, adapter: Adapter) -> list[Rule]:
    """The insertion at a site, one rule for each way its weight may be read: a matrix in any form of one."""
    dims = len(site.weight_shape)
    readable = [form for form in FORMS if form == site.form or (dims == 2 and form not in CONVOLUTIONS)]
    patterns = dict.fromkeys(pattern for form in readable for pattern in form.patterns)
    return [Rule(pattern, adapter.kind.equation(site, pattern), _reads_weight) for pattern in patterns]


def _reads_weight(found: Match) -> str | None:
    return None if found.bindings["weight"].op == "get_attr" else "its weight is part of one"


def _is_base(rule: Rule, node: Node, weight: Node) -> bool:
    """Whether a node of the equation is what its pattern was: the read of the base weight."""
    again = rule.find(node)
    return isinstance(again, Match) and again.bindings["weight"] is weight


def _reads_own_bias(gm: GraphModule, found: Match, site: Site) -> bool:
    """Whether this is the site's own module, and not a twin that shares its weight and has a bias of its own."""
    bias = found.bindings.get("bias")
    read = find_tensor(gm, str(bias.target)) if isinstance(bias, Node) and bias.op == "get_attr" else None
    return read is find_tensor(gm, site.bias)


def _fresh(
    gm: GraphModule, site: Site, adapter: Adapter, node: Node, dtype: torch.dtype | None, own_bias: bool
) -> dict[str, Any]:
    """What the names of an equation stand for; a twin that has a bias of its own is not given the adapter's."""
    paths = adapter.tensors[site.name]
    names = adapter.kind.names(site, adapter.config)
    tensors = {
        name: Attribute(paths[suffix], dtype) if suffix and (own_bias or not suffix.endswith("bias")) else None
        for name, suffix in names.items()
    }
    return {
        **tensors,
        **adapter.kind.scalars(site, adapter.config),
        "training": gm.get_submodule(site.name).training,
        "dtype": dtype,
        "result_dtype": node.meta["val"].dtype,
    }


def _read_own_copies(gm: GraphModule, adapter: Adapter, mode: FakeTensorMode) -> int:
    """Send the reads of replaced base tensors to the adapter's copies."""
    copies = {id(tensor_at(gm, base)): (base, copy) for base, copy in adapter.replaced.items()}
    owners = Counter(id(p) for module in gm.modules() for p in module._parameters.values()) if copies else Counter()
    count = 0
    for node in gm.graph.find_nodes(op="get_attr"):
        tensor = id(find_tensor(gm, node.target))
        base, copy = copies.get(tensor, ("", ""))
        users = [user for user in node.users if copy and (owners[tensor] <= 1 or _is_within(user, node, base))]
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
