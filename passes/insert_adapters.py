"""insert_adapters: the adapters' equations wrap the base operator, at every site.

x, W -> operator -> y        ->        x -> before -> operator (as it was) -> after -> y'

The operator is found by the patterns of the site (`adapters/equation.py`); `before` and `after` are the kind's
(`adapters/kinds/`), in which the adapter's tensors become reads of the tree. The inverse is `merge_adapters`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from lorafx.adapters.adapter import Adapter
from lorafx.adapters.equation import Equation
from lorafx.adapters.site import Site
from lorafx.adapters.tying import parted
from lorafx.errors import ConfigError
from lorafx.graph import ADAPTED_BY, SITE, Provenance, describe, fake_mode_of, write
from lorafx.pipeline import Context, Pass
from lorafx.torch_private.tracing import FakeTensorMode
from lorafx.tree.lookup import find_tensor, tensor_at

from .inserting_by_row import insert_by_row, named


@dataclass
class _Layer:
    """A base operator and the equations around it so far: input, output, and all their nodes in order."""

    x: Node
    y: Node
    nodes: list[Node] = field(default_factory=list)


@dataclass(frozen=True)
class InsertAdapters(Pass):
    """Afterwards every node with a site is wrapped in the equations of the context's adapters, the first innermost.

    An update is computed in the dtype of the base operator's input, whatever dtype the adapter's parameters have, as
    under autocast; or in `compute_dtype`, by name, as "float32". Biases and modules that an adapter trains as a whole
    are read from its own copies, in the dtype of the base's.
    """

    compute_dtype: str | None = None

    exact = True
    requires = frozenset({"sites"})
    establishes = frozenset({"adapters"})

    def __post_init__(self) -> None:
        dtype = getattr(torch, self.compute_dtype or "float32", None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ConfigError(
                f"{self.compute_dtype!r} is no dtype to compute in; choose one as 'float32' or 'bfloat16'"
            )

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        if context.numbers:
            return insert_by_row(gm, context, self._dtype)
        mode, count = fake_mode_of(gm), 0
        sites = [(adapter, adapter.sites_by_weight(gm)) for adapter in context.adapters]
        for node in [node for node in gm.graph.nodes if SITE in node.meta]:
            weight = id(tensor_at(gm, node.meta[SITE].weight))
            acting = [(adapter, by_weight[weight]) for adapter, by_weight in sites if weight in by_weight]
            layer = None
            for adapter, site in acting:
                _require_own_weight(node, site, adapter, context.merged)
                with named(site, adapter):
                    layer = self._wrap(gm, node, layer, site, adapter, mode)
            count += len(acting)
        for adapter in context.adapters:
            count += _read_own_copies(gm, adapter, mode)
        return count

    def _wrap(
        self, gm: GraphModule, base: Node, layer: _Layer | None, site: Site, adapter: Adapter, mode: FakeTensorMode
    ) -> _Layer:
        """Wrap one more equation around a base operator and the equations around it already."""
        equation, found = Equation.at(gm, base, adapter, site)
        x: Node = found.bindings["x"]
        layer = layer or _Layer(x, base, [base])
        where = Provenance(self.name, site.name, adapter.name)
        given = equation.given(self._dtype(equation, layer.x), found.bindings) | {"x": layer.x, "y": layer.y}
        given_y = given | {"result_dtype": layer.y.meta["val"].dtype}
        given_x = given | {"result_dtype": layer.x.meta["val"].dtype} if isinstance(layer.x, Node) else given_y

        y, after = write(gm, equation.after(), given_y, layer.y.next, base, where, mode)
        for user in [user for user in layer.y.users if user not in after and y is not layer.y]:
            user.replace_input_with(layer.y, y)
        x, before = write(gm, equation.before(), given_x, layer.nodes[0], base, where, mode)
        for node in layer.nodes if x is not layer.x else ():
            node.replace_input_with(layer.x, x)
        base.meta[ADAPTED_BY] = (*base.meta.get(ADAPTED_BY, ()), adapter.name)
        return _Layer(layer.x, y, [*before, *layer.nodes, *after])

    def _dtype(self, equation: Equation, x: Node) -> torch.dtype | None:
        """The dtype of an update; None for a lookup, which is computed in the adapter's own dtype."""
        if equation.operator.lookup:
            return None
        return getattr(torch, self.compute_dtype) if self.compute_dtype else x.meta["val"].dtype


def _require_own_weight(base: Node, site: Site, adapter: Adapter, merged: frozenset[str]) -> None:
    """Raise `ConfigError` for a kind that needs the weight where another adapter has changed what that is."""
    inside = [name for name in base.meta.get(ADAPTED_BY, ()) if name not in merged]
    if adapter.kind.needs_weight(site) and inside and adapter.name not in merged:
        raise ConfigError(
            f"site {site.name}: {adapter.name!r} needs the weight, and {', '.join(inside)} inside of it "
            "changes what that is; activate it first"
        )


def _read_own_copies(gm: GraphModule, adapter: Adapter, mode: FakeTensorMode) -> int:
    """Make reads of base tensors that the adapter has its own copies of read those."""
    copies: dict[int, list[tuple[str, str]]] = {}  # of a tied tensor one for each module, for the reads in it
    for base, copy in adapter.replaced.items():
        copies.setdefault(id(tensor_at(gm, base)), []).append((base, copy))
    apart, count = parted(gm, adapter.replaced), 0
    for node in gm.graph.find_nodes(op="get_attr"):
        tensor = id(find_tensor(gm, node.target))
        for base, copy in copies.get(tensor, ()):
            users = [user for user in node.users if tensor not in apart or _is_within(user, node, base)]
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
        dtype = node.meta["val"].dtype
        if own.meta["val"].dtype != dtype:  # the copy trains in a wider one than the model computes in
            own = gm.graph.call_function(torch.ops.aten.to.dtype, (own, dtype))
            describe(own, users[0], provenance, gm, mode)
    for user in users:
        user.replace_input_with(node, own)
    if not node.users:
        gm.graph.erase_node(node)


def _is_within(user: Node, read: Node, base: str) -> bool:
    """Whether a read of a tied tensor is made by the module of the path `base`, and not by another that has it."""
    owner = base.rpartition(".")[0]
    innermost = [path.partition("@")[0] for path, _ in user.meta.get("nn_module_stack", {}).values()][-1:]
    return innermost == [owner] or (read.target == base and any(owner.startswith(path) for path in innermost))
