"""orthogonal: small factors that make orthogonal matrices near the identity, for adapters that turn features.

cayley        R - I = -2 Q (I + Q)⁻¹ of each block, Q skew-symmetric; or 2Q + 2Q² + … + Qⁿ⁻¹, of so many terms
reflections   I - U T Uᵀ = Π (I - 2 u uᵀ), of the columns u of U;  T⁻¹ = ½ I + what is above the diagonal in Uᵀ U

The second is the compact form of a product of Householder matrices (Schreiber and Van Loan, 1989), so that r of them
cost two products with r features instead of r steps one after another. What differs from the identity is small beside
it, and is given by itself, so that half precision keeps it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dtypes import at_least_float32
from .library import composite
from .modes import without_autocast


def skew_symmetric(q: Tensor, size: int) -> Tensor:
    """Q, (blocks, size, size), of the numbers above the diagonal of each, (blocks, size · (size - 1) / 2)."""
    rows, columns = torch.triu_indices(size, size, 1, device=q.device)
    upper = q.new_zeros(q.shape[0], size * size).index_copy(1, rows * size + columns, q).view(-1, size, size)
    return upper - upper.mT


def cayley(skew: Tensor, terms: int) -> Tensor:
    """R - I of each Q, (…, size, size), of any floating dtype.

    `terms` is how many terms of Neumann's series to use, as in PEFT's OFT; 0 solves. It is computed and given in
    float32, or float64 if Q is: half precision cannot be solved in. Differentiable.
    """
    skew = at_least_float32(skew)
    with without_autocast(skew.device.type):  # it would round the powers
        if terms:
            return _series(skew, terms)
        identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
        return torch.linalg.solve(identity + skew, -2 * skew, left=False)


def _series(skew: Tensor, terms: int) -> Tensor:
    """As PEFT adds up: the last power counts once, the others twice; three terms are four."""
    if terms == 1:
        return torch.zeros_like(skew)
    total, power = 2 * skew, skew
    if terms > 2:
        for _ in range(2, max(terms, 4) - 1):
            power = power @ skew
            total = total.add(power, alpha=2)
        total = total + power @ skew
    return total


def reflections(u: Tensor, together: bool) -> tuple[Tensor, Tensor]:
    """U and U T, (in, r) both: x - (x U) (U T)ᵀ is x after all reflections, the last column's first.

    `u` is (in, r), whose columns are normed here; with `together`, all that their span has is reflected, which is what
    reflections by orthogonal columns of the same span do. A column of zeros reflects nothing. Dtypes are those of
    `cayley`; differentiable.
    """
    u = at_least_float32(u)
    with without_autocast(u.device.type):
        norms = u.norm(dim=0)
        bare = (norms == 0).to(u.dtype)
        normed = u / (norms + bare)
        gram = normed.mT @ normed + torch.diag(bare)
        inverse = gram / 2 if together else gram.triu(1) + torch.eye(u.shape[1], dtype=u.dtype, device=u.device) / 2
        return normed, torch.linalg.solve(inverse, normed, left=False)


composite("skew_symmetric(Tensor q, int size) -> Tensor", skew_symmetric)
composite("cayley(Tensor skew, int terms) -> Tensor", cayley)
composite("reflections(Tensor u, bool together) -> (Tensor, Tensor)", reflections)
