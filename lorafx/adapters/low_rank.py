"""The change of a weight that two small matrices make, row by row, and the same bits whoever multiplies.

    ΔW = L R        L (rows, r), R (r, columns)

Libraries add up the r products in orders of their own, which depend on shapes, threads and devices, so ΔW may come out
differently the next time. Here L and R are first cut to so few bits that float64 holds each product and each sum
exactly: then no order matters. An entry keeps ⌊(53 - ⌈log₂ r⌉) / 2⌋ bits below the largest of its row of L, or of its
column of R, that is 24 for r = 32 and 22 for r = 256, so that ΔW is as near as a product in float32 comes. A factor in
float64 is cut into three such matrices, each the rest of the one before, and ΔW is the sum of their products in a fixed
order: as near as a product in float64 (the scheme of Ozaki et al., Numerical Algorithms 59, 2012).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import EllipsisType

import torch
from torch import Tensor

_FLOAT64_BITS = 53


@dataclass(frozen=True)
class LowRank:
    """L R as a change of a weight of `shape`, whose first size counts the rows of L. Nothing is computed before it is
    asked for.

    The factors are of any floating dtype up to float64. They may be stacks of factors, (n, rows, r) and
    (n, r, columns), for as many weights.
    """

    left: Tensor
    right: Tensor
    shape: tuple[int, ...]

    def __mul__(self, factor: float) -> LowRank:
        return replace(self, right=self.right * factor)

    __rmul__ = __mul__

    @classmethod
    def stacked(cls, several: Sequence[LowRank]) -> LowRank:
        """A stack of changes whose factors have the same shapes and dtypes."""
        if len(several) == 1:
            return cls(several[0].left[None], several[0].right[None], several[0].shape)
        left, right = (torch.stack(factors) for factors in zip(*((each.left, each.right) for each in several)))
        return cls(left, right, several[0].shape)

    def rows(self, rows: slice | EllipsisType, out: Tensor | None = None) -> Tensor:
        """Some rows of a stack, in float64: (n, count, *shape[1:]), in `out` if it is given, of that shape."""
        (left, right), *others = self._factors
        flat = None if out is None else out.view(len(left), -1, right.shape[2])
        total = _product(left, right, rows, flat)
        for left, right in others:
            total += _product(left, right, rows)
        return total.view(len(left), -1, *self.shape[1:])

    def dense(self) -> Tensor:
        """All of it, in float64: of `shape`."""
        first, *others = (left @ right for left, right in self._factors)
        return sum(others, start=first).view(self.shape)

    def norm(self) -> float:
        """Its Frobenius norm, of products of r × r: ‖L R‖² is the sum of (Lᵀ L) ∘ (R Rᵀ)."""
        left, right = self.left.double(), self.right.double()
        return float(((left.mT @ left) * (right @ right.mT)).sum().clamp(min=0).sqrt())

    @functools.cached_property
    def _factors(self) -> list[tuple[Tensor, Tensor]]:
        """Pairs of factors in float64 whose products are exact, and to be added up."""
        bits = (_FLOAT64_BITS - math.ceil(math.log2(self.left.shape[-1]))) // 2
        if torch.float64 not in (self.left.dtype, self.right.dtype):
            return [(_cut(self.left, -1, bits), _cut(self.right, -2, bits))]
        left, right = _cuts(self.left, -1, bits), _cuts(self.right, -2, bits)
        return [
            (left[i], right[j]) for i in range(3) for j in range(3 - i)
        ]  # the other products are too small to count


def _product(left: Tensor, right: Tensor, rows: slice | EllipsisType, out: Tensor | None = None) -> Tensor:
    """Some rows of a stack of products, (n, count, columns), in `out` if it is given."""
    if len(left) == 1:
        return torch.mm(left[0, rows], right[0], out=None if out is None else out[0])[None]
    return torch.bmm(left[:, rows], right, out=out)


def _cuts(matrix: Tensor, along: int, bits: int) -> list[Tensor]:
    """Three matrices that add up to the matrix, each cut to `bits` bits, which are at least 18 up to r = 2^17."""
    cuts, rest = [], matrix.double()
    for _ in range(3):
        cuts.append(_cut(rest, along, bits))
        rest = rest - cuts[-1]
    return cuts


def _cut(matrix: Tensor, along: int, bits: int) -> Tensor:
    """The matrix in float64, each entry rounded to `bits` bits below the largest along a dimension.

    x + c - c rounds x to the last bit of c, which is a power of two times 1.5 so that the sum stays between two powers.
    """
    exact = matrix.double()
    largest = exact.abs().amax(along, keepdim=True)
    power = (largest / torch.frexp(largest).mantissa).nan_to_num(1.0)  # the power of two above it; 1 of 0, inf and nan
    rounder = power * (1.5 * 2.0 ** (_FLOAT64_BITS - 1 - bits))
    return (exact + rounder).sub_(rounder)
