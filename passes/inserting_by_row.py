"""What `insert_adapters` does where each row of a call chooses its adapter: one joint equation at every site.

x, W -> operator -> y        ->        x -> before of the rows -> operator (as it was) -> after of the rows -> y'

Which adapter a row has is an input of the graph, (rows,) of numbers, so that one graph serves all choices; or which a
token has, (rows, tokens). At each site it has to be known which rows are which. The sizes in the graph, which are
symbols, prove it: a first size is the number of rows if it is that symbol, and not because it happens to be as large.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lorafx.adapters.adapter import Adapter
from lorafx.adapters.by_row import ROWS, RowEquations
from lorafx.adapters.equation import Equation
from lorafx.adapters.site import Site
from lorafx.errors import ConfigError, LorafxError, UncoveredOperatorError, user_line
from lorafx.graph import ADAPTED_BY, SITE, Provenance, fake_mode_of, write
from lorafx.graph.outline import give_to_blocks
from lorafx.pipeline import Context
from lorafx.tree.lookup import tensor_at

aten = torch.ops.aten
DtypeOf = Callable[[Equation, Node], torch.dtype | None]

# Operators that leave the rows of what they are given first where they are, besides those that torch calls pointwise.
_KEEPS_ROWS = {
    *(aten.linear.default, aten.dropout.default, aten.contiguous.default, aten.clone.default, aten.to.dtype),
    *(aten.layer_norm.default, aten.rms_norm.default, torch.ops.lorafx.rms_norm.default),
    *(torch.ops.lorafx.lora_by_row.default, torch.ops.lorafx.is_of_row.default, torch.ops.lorafx.own_forward.default),
}
_RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints}


def insert_by_row(gm: GraphModule, context: Context, dtype_of: DtypeOf) -> int:
    """Wrap every node with a site in the equations of the context's adapters there, each for its own rows.

    Raises `UncoveredOperatorError` for a site where nobody can tell which rows it is given.
    """
    rows = next(node for node in gm.graph.find_nodes(op="placeholder") if node.target == ROWS)
    give_to_blocks(gm, rows)
    sites = [(adapter, adapter.sites_by_weight(gm)) for adapter in context.adapters]
    count = 0
    for node in [node for node in gm.graph.nodes if SITE in node.meta]:
        weight = id(tensor_at(gm, node.meta[SITE].weight))
        acting = [
            (adapter, by_weight[weight], number)
            for (adapter, by_weight), number in zip(sites, context.numbers)
            if weight in by_weight
        ]
        if acting:
            _wrap(gm, node, rows, acting, dtype_of)
        count += len(acting)
    return count


def _wrap(gm: GraphModule, base: Node, rows: Node, acting: list[tuple[Adapter, Site, int]], dtype_of: DtypeOf) -> None:
    """Wrap the equations of adapters around a base operator."""
    at = [Equation.at(gm, base, adapter, site) for adapter, site, _ in acting]
    bindings, site = at[0][1].bindings, acting[0][1]
    joint = RowEquations(tuple(equation for equation, _ in at), tuple(number for *_, number in acting))
    x: Node = bindings["x"]
    if not (at[0][0].operator.is_of_rows and _has_rows_first(x, rows)):
        raise UncoveredOperatorError(
            f"site {site.name} is given {tuple(x.meta['val'].shape)}, of which nobody can tell which rows of the batch "
            f"these are [{user_line(base)}]; give each adapter's rows a call of their own, or leave the module out "
            "(`exclude_modules`)"
        )
    names = ", ".join(adapter.name for adapter, *_ in acting)
    where, mode = Provenance("insert_adapters", site.name, names), fake_mode_of(gm)
    given = joint.given(dtype_of(at[0][0], x), bindings, rows) | {"x": x, "y": base}
    given_x, given_y = (given | {"result_dtype": node.meta["val"].dtype} for node in (x, base))
    with named(site, acting[0][0]):
        y, after = write(gm, joint.after(), given_y, base.next, base, where, mode)
        base.replace_all_uses_with(y, delete_user_cb=lambda user: user not in after)
        inner, _ = write(gm, joint.before(), given_x, base, base, where, mode)
    if inner is not x:
        base.replace_input_with(x, inner)
    base.meta[ADAPTED_BY] = (*base.meta.get(ADAPTED_BY, ()), *(adapter.name for adapter, *_ in acting))


def _has_rows_first(node: Node, rows: Node) -> bool:
    """Whether a value has the rows of the batch first, in order; or their tokens, by a reshape of such a value.

    Where tokens have adapters of their own, there are no more of them than the call has.
    """
    numbers, value = rows.meta["val"], node.meta.get("val")
    if not isinstance(value, Tensor) or not value.ndim:
        return False
    if numbers.ndim == 2 and value.ndim > 2 and value.shape[1] > numbers.shape[1]:
        return False
    if (numbers.ndim == 1 and numbers.shape[0] == 1) or _same(value.shape[0], numbers.shape[0]):
        return True
    if node.target in _RESHAPES:
        source = node.all_input_nodes[0]
        inside = source.meta["val"]
        return inside.ndim > 1 and _same(inside.shape[-1], value.shape[-1]) and _has_rows_first(source, rows)
    if node.op == "call_function" and (node.target in _KEEPS_ROWS or _is_pointwise(node)):
        given = [each for each in node.all_input_nodes if _starts_alike(each, value)]
        return bool(given) and all(_has_rows_first(each, rows) for each in given)
    return False


def _starts_alike(node: Node, value: Tensor) -> bool:
    other = node.meta.get("val")
    return isinstance(other, Tensor) and other.ndim == value.ndim and _same(other.shape[0], value.shape[0])


def _is_pointwise(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _same(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are the same expression, and not just equal now."""
    return str(a) == str(b)


@contextlib.contextmanager
def named(site: Site, adapter: Adapter) -> Iterator[None]:
    """Name the site and the kind where torch refuses to compute an equation."""
    try:
        yield
    except LorafxError:
        raise
    except RuntimeError as error:
        kind = adapter.config.peft_type
        raise ConfigError(f"site {site.name}: the equation of {kind} cannot be computed: {error}") from error
