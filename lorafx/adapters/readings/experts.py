"""Experts: a weight that stacks a matrix for each, (experts, out, in), or (experts, in, out) where modules say so.

    y[t] = x[t] W[e]ᵀ, of the expert e of row t        ΔW[e] = B[e] A[e]

Modules read it in one of three ways: tokens that are sorted by expert, in one grouped product; the matrix of one
expert, or of each token's, taken by number; or as many tokens for each expert, in a batch. A and B are kept as PEFT
keeps them (`ops/by_expert.py`). No module class has this reading: a config names the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ops.by_expert import factors_in, factors_out
from .reading import Arguments, Operator, Reading, Shape
from .value import operator_of_value

aten, ours = torch.ops.aten, torch.ops.lorafx
Calls = tuple[tuple[Callable[..., Any], Arguments], ...]


def fallback(x, weight, offs):
    """What transformers has where torch's kernel does not serve, and where it is captured."""
    from transformers.integrations import moe  # noqa: F401, defines it, and imports Dynamo, which takes seconds

    return torch.ops.transformers.grouped_mm_fallback.default(x, weight, offs)


def _grouped(product: Any, of_factors: Any, transposed: bool, calls: Calls = ()) -> Operator:
    """(tokens, in) sorted by expert, (experts, in, out) by `product`, or `of_factors` if small -> (tokens, out)"""

    def grouped(x, weight, offs):
        return product(x, weight if transposed else aten.transpose.int(weight, -2, -1), offs)

    def narrow(x, a, offs):
        return of_factors(x, ours.expert_factors_in.default(a, offs), offs)

    def wide(h, b, offs):
        return of_factors(h, ours.expert_factors_out.default(b, offs), offs)

    return Operator(grouped, narrow, wide, transposed=transposed, calls=calls)


def called_grouped(mat_a, mat_b, *, offs=None, bias=None, out_dtype=None):
    return (mat_a, mat_b, offs) if bias is None and out_dtype in (None, mat_a.dtype) else None


def _taken(take: Callable[[Any, Any], Any], transposed: bool, calls: Calls = ()) -> Operator:
    """(…,) of experts' numbers -> (…, out, in), or (…, in, out); `take` does it to any (experts, …)."""

    def taken(x, weight):
        return take(weight, x)

    def narrow(x, a, weight):
        """-> (…, in, r)"""
        return take(ours.expert_factors_in.default(a, weight), x)

    def wide(h, b, x, weight):
        update = aten.matmul.default(h, take(ours.expert_factors_out.default(b, weight), x))
        return update if transposed else aten.transpose.int(update, -2, -1)

    return Operator(taken, narrow, wide, transposed=transposed, lookup=True, calls=calls)


def _of_each(tensor: Any, numbers: Any) -> Any:
    return aten.index.Tensor(tensor, [numbers])


def _of_one(tensor: Any, number: Any) -> Any:
    return aten.select.int(tensor, 0, number)


def called_taken(weight, index):
    if isinstance(index, int) and not isinstance(index, bool):
        index = torch.tensor(index, device=weight.device)
    is_number = isinstance(index, Tensor) and not index.is_floating_point() and index.dtype != torch.bool
    return (index, weight) if is_number else None


def _value(transposed: bool) -> Operator:
    """The whole stack, (experts, out, in), or (experts, in, out)."""

    def narrow(x, a, weight):
        """-> (experts, in, r)"""
        return ours.expert_factors_in.default(a, weight)

    def wide(h, b, weight):
        out = ours.expert_factors_out.default(b, weight)
        if transposed:
            return aten.bmm.default(h, out)
        return aten.bmm.default(aten.transpose.int(out, 1, 2), aten.transpose.int(h, 1, 2))

    return operator_of_value(narrow, wide, transposed)


def batched(x, weight):
    """(experts, tokens, in), (experts, in, out) -> (experts, tokens, out)"""
    return aten.bmm.default(x, weight)


def called_batched(input, mat2, *, out=None):
    return (input, mat2) if out is None else None


def narrow_of_batched(x, a):
    """(experts, tokens, in), (r · experts, in) -> (experts, tokens, r)"""
    return aten.bmm.default(x, ours.expert_factors_in.default(a, x))


def wide_of_batched(h, b):
    """(experts, tokens, r), (out, r · experts) -> (experts, tokens, out)"""
    return aten.bmm.default(h, ours.expert_factors_out.default(b, h))


def narrow_of_turned(x, a):
    """As `narrow_of_batched`, where A takes the place of B: (r · experts, in), kept as PEFT keeps Bᵀ."""
    return aten.bmm.default(x, aten.transpose.int(ours.expert_factors_out.default(aten.t.default(a), x), 1, 2))


def wide_of_turned(h, b):
    """As `wide_of_batched`, where B takes the place of A: (out, r · experts), kept as PEFT keeps Aᵀ."""
    return aten.bmm.default(h, aten.transpose.int(ours.expert_factors_in.default(aten.t.default(b), h), 1, 2))


@dataclass(frozen=True, repr=False)
class Experts(Reading):
    """The reading of a weight of three dimensions, the first of which counts experts."""

    matrix: bool = False

    def features(self, shape: Shape, groups: int) -> tuple[int, int]:
        return (shape[1], shape[2]) if self.transposed else (shape[2], shape[1])

    def factors(self, shape: Shape, groups: int, rank: int) -> tuple[Shape, Shape]:
        inputs, outputs = self.features(shape, groups)
        return (rank * shape[0], inputs), (outputs, rank * shape[0])

    def product(self, a: Tensor, b: Tensor, shape: Shape) -> Tensor:
        like = a.new_empty(shape[0], 0)
        delta = factors_in(a, like) @ factors_out(b, like)
        return delta if self.transposed else delta.transpose(1, 2)


def _reads(transposed: bool, *others: Operator) -> tuple[Operator, ...]:
    """The operators of one of the two shapes. None of them can tell which rows of a batch it is given."""
    by_number = ((Tensor.__getitem__, called_taken),)
    by_offsets = ((F.grouped_mm, called_grouped),) if transposed else ()  # else it is given a view
    operators = (
        _grouped(aten._grouped_mm.default, ours.grouped_mm.default, transposed, by_offsets),
        _grouped(fallback, fallback, transposed),
        _taken(_of_each, transposed, by_number),
        _taken(_of_one, transposed),
        *others,
    )
    return tuple(replace(each, is_of_rows=False) for each in operators)


_BATCHED = ((torch.bmm, called_batched),)
EXPERTS = Experts(
    "experts",
    (),
    _reads(False, Operator(batched, narrow_of_turned, wide_of_turned, transposed=True, calls=_BATCHED)),  # as Llama 4
    weight="",
    bias="",
    value=_value(False),
)
TRANSPOSED_EXPERTS = Experts(
    "transposed experts",
    (),
    _reads(True, Operator(batched, narrow_of_batched, wide_of_batched, transposed=True, calls=_BATCHED)),
    weight="",
    bias="",
    value=_value(True),
)
