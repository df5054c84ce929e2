"""The change of a weight that two small matrices make, row by row, and the same bits whoever multiplies.

    ΔW = L R        L (rows, r), R (r, columns)

Libraries add up the r products in orders of their own, which depend on shapes, threads and devices, so ΔW may come out
differently the next time. Here L and R are first cut to so few bits that float64 holds each product and each sum
exactly: then no order matters. An entry keeps ⌊(53 - ⌈log₂ r⌉) / 2⌋ bits below the largest of its row of L, or of its
column of R, that is 24 for r = 32 and 22 for r = 256, so that ΔW is as near as a product in float32 comes.
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

    The factors are float32 or narrower; or float64, whose product is an ordinary one. They may be stacks of factors,
    (n, rows, r) and (n, r, columns), for as many weights.
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
        left, right = self._factors
        count, columns = len(left), right.shape[2]
        if count == 1:
            flat = None if out is None else out.view(-1, columns)
            return torch.mm(left[0, rows], right[0], out=flat).view(1, -1, *self.shape[1:])
        flat = None if out is None else out.view(count, -1, columns)
        return torch.bmm(left[:, rows], right, out=flat).view(count, -1, *self.shape[1:])

    def dense(self) -> Tensor:
        """All of it, in float64: of `shape`."""
        left, right = self._factors
        return (left @ right).view(self.shape)

    def norm(self) -> float:
        """Its Frobenius norm, of products of r × r: ‖L R‖² is the sum of (Lᵀ L) ∘ (R Rᵀ)."""
        left, right = self.left.double(), self.right.double()
        return float(((left.mT @ left) * (right @ right.mT)).sum().clamp(min=0).sqrt())

    @functools.cached_property
    def _factors(self) -> tuple[Tensor, Tensor]:
        """The factors in float64, with as many bits as have exact sums."""
        if torch.float64 in (self.left.dtype, self.right.dtype):
            return self.left.double(), self.right.double()
        bits = (_FLOAT64_BITS - math.ceil(math.log2(self.left.shape[-1]))) // 2
        return _cut(self.left, -1, bits), _cut(self.right, -2, bits)


def _cut(matrix: Tensor, along: int, bits: int) -> Tensor:
    """The matrix in float64, each entry rounded to `bits` bits below the largest along a dimension.

    x + c - c rounds x to the last bit of c, which is a power of two times 1.5 so that the sum stays between two powers.
    """
    exact = matrix.double()
    largest = exact.abs().amax(along, keepdim=True)
    power = (largest / torch.frexp(largest).mantissa).nan_to_num(1.0)  # the power of two above it; 1 of 0, inf and nan
    rounder = power * (1.5 * 2.0 ** (_FLOAT64_BITS - 1 - bits))
    return (exact + rounder).sub_(rounder)
