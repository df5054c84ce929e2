"""Several adapters where one operator reads a weight, each for its own rows of the batch.

    x' = beforeₖ(x) at the rows of adapter k, x at others        y' = afterₖ(operator(x'), x) at the rows of adapter k

An operator that reads a weight does to each row what it does to any, so that it runs once, on all. Kinds that can do
better than to be evaluated on all rows, one adapter after another, say so (`Kind.by_row`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph
from torch.utils import _pytree as pytree

from .. import ops  # noqa: F401, defines torch.ops.lorafx
from ..graph.match import template
from ..torch_private.tensors import base_of, is_wrapped
from .equation import BOUND, Equation
from .kinds import Kind, Operands

aten = torch.ops.aten
# Of a call: the number of each row's adapter, (rows,) of int64, or each token's, (rows, tokens); 0 is the base alone.
ROWS = "lorafx_rows"


@dataclass(frozen=True)
class RowEquations:
    """The equations of adapters at one place, and the numbers that rows, or tokens, choose them by."""

    equations: tuple[Equation, ...]
    numbers: tuple[int, ...]

    def before(self) -> Graph:
        """The graph that computes x', as `Equation.before` gives it, of several; `rows` is one more input."""

        def equation(x: Any, rows: Any, dtype: Any, result_dtype: Any, **given: Any) -> Any:
            return self.x_of(x, rows, dtype, result_dtype, list(self._operands(given)))

        return template(equation, self._names("x"))

    def after(self) -> Graph:
        """The graph that computes y', as `Equation.after` gives it, of several; `rows` is one more input."""

        def equation(y: Any, x: Any, rows: Any, dtype: Any, result_dtype: Any, **given: Any) -> Any:
            return self.y_of(y, x, rows, dtype, result_dtype, list(self._operands(given)))

        return template(equation, self._names("y", "x"))

    def x_of(self, x: Any, rows: Any, dtype: Any, result_dtype: Any, ats: Sequence[Operands]) -> Any:
        """x', of symbols for a graph or of tensors; `ats` is what each equation is given."""
        result = x
        for equation, number, at in zip(self.equations, self.numbers, ats):
            found = equation.x_of(x, dtype, result_dtype, at)
            result = result if found is x else _selected(rows, number, found, result)
        return result

    def y_of(self, y: Any, x: Any, rows: Any, dtype: Any, result_dtype: Any, ats: Sequence[Operands]) -> Any:
        """y', of symbols for a graph or of tensors."""
        result = y
        for kind, group in self._kinds(ats):
            equations, numbers, given = zip(*group)
            together = None
            if _is_of_same_class(kind):
                together = kind.by_row(result, equations[0].cast(x, dtype), rows, numbers, given)
            if together is not None:
                result = aten.to.dtype(together, result_dtype)
                continue
            for equation, number, at in group:
                found = equation.y_of(y, x, dtype, result_dtype, at)
                result = result if found is y else _selected(rows, number, found, result)
        return result

    def given(self, dtype: torch.dtype | None, bindings: dict[str, Any], rows: Any) -> dict[str, Any]:
        """Values for the graphs' inputs."""
        values: dict[str, Any] = {"rows": rows, "dtype": dtype}
        for place, equation in enumerate(self.equations):
            for name, value in equation.given(dtype, bindings).items():
                values[name if name == "dtype" or name.startswith(BOUND) else _of(place, name)] = value
        return values

    def _names(self, *first: str) -> list[str]:
        bound = dict.fromkeys(f"{BOUND}{name}" for equation in self.equations for name in equation.bound)
        own = [_of(place, name) for place, each in enumerate(self.equations) for name in each.inputs]
        return [*first, "rows", *own, *bound, "dtype", "result_dtype"]

    def _operands(self, given: dict[str, Any]) -> Iterator[Operands]:
        for place, equation in enumerate(self.equations):
            own = {name: given[_of(place, name)] for name in equation.inputs}
            yield equation.operands_of(own | {f"{BOUND}{name}": given[f"{BOUND}{name}"] for name in equation.bound})

    def _kinds(self, ats: Sequence[Operands]) -> list[tuple[Kind, list[tuple[Equation, int, Operands]]]]:
        """What there is of each kind: the equations, their numbers, what they are given."""
        kinds: dict[int, tuple[Kind, list[tuple[Equation, int, Operands]]]] = {}
        for each in zip(self.equations, self.numbers, ats):
            kind = each[0].adapter.kind
            kinds.setdefault(id(kind), (kind, []))[1].append(each)
        return list(kinds.values())


def _is_of_same_class(kind: Kind) -> bool:
    """Whether `by_row` is not inherited by a class that has an equation of its own, which it would miss."""
    first = {
        name: next(cls for cls in type(kind).__mro__ if name in vars(cls)) for name in ("by_row", "before", "after")
    }
    return all(issubclass(first["by_row"], cls) for cls in first.values())


def _of(place: int, name: str) -> str:
    return f"adapter_{place}_{name}"


def _selected(rows: Any, number: int, found: Any, otherwise: Any) -> Any:
    """What was found at the rows of an adapter, and what there was at others."""
    mask = torch.ops.lorafx.is_of_row.default(rows, found, number)
    return aten.where.self(mask, found, otherwise)


def first_tensor(values: Iterable[Any]) -> Tensor | None:
    """The first tensor among a call's arguments, whose first size is the number of rows: input ids, or an image."""
    leaves = (leaf for value in values for leaf in pytree.tree_leaves(value))
    return next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), None)


def follows(x: Tensor, rows: Tensor, one_token: bool, turned: bool = False) -> bool:
    """Whether a tensor that an operator is given has the rows of the batch first, in order, as far as can be told.

    A matrix may be the tokens of some rows, as an expert's. It is the rows if each has `one_token`, or if it is seen to
    be another tensor with the rows first, flattened: each row's numbers lie together in memory. If rows may be
    `turned`, to come second, they are known to come first only where the other sizes are not as large. Where tokens
    have adapters of their own, so it is with the tokens of a single row, too.
    """
    if is_wrapped(x):  # vmap hides one of its sizes, which may be the rows
        return False
    count, base = rows.shape[0], base_of(x)
    if turned and count > 1 and count in x.shape[1 : x.ndim - x.is_floating_point()]:
        return False
    if rows.ndim == 2 and x.ndim > 2 and x.shape[1] > rows.shape[1]:
        return False
    is_first = x.shape[0] == count and (x.ndim > 2 or one_token or not x.is_floating_point())
    if is_first or (count == 1 and rows.ndim == 1):
        return True
    if base is None or base.ndim < 3 or base.shape[0] != count or base.numel() != x.numel():
        return False
    return x.is_contiguous() and base.stride(0) * count == base.numel() and x.storage_offset() == base.storage_offset()
