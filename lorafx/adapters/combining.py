"""Combining: several tensors τ₁ … τₙ, each what one task has changed, as one, by weights w₁ … wₙ.

    linear           Σ wᵢ τᵢ                  (Ilharco et al., arXiv 2212.04089)
    magnitude_prune  Σ wᵢ largest(τᵢ)
    dare_linear      Σ wᵢ dropped(τᵢ)         (Yu et al., arXiv 2311.03099)
    ties             elected(largest(τ))      (Yadav et al., arXiv 2306.01708)
    dare_ties        elected(dropped(τ))

largest(τ)   the ⌊density · n⌋ of τ's n entries that are largest in magnitude; the others are zero
dropped(τ)   each entry, with probability `density`, divided by that; else zero
elected(τ)   Σ kᵢ wᵢ τᵢ / max(1, Σ kᵢ), where kᵢ is 1 where τᵢ has the sign of Σ τᵢ, or with "frequency" Σ sign(τᵢ),
             and 0 elsewhere; a sum of zero counts as positive. The weights have no say in the sign, as in PEFT.

With `_svd` the tensors are whole changes of a weight, and what comes out is brought to a rank by its largest singular
values; "svd" alone is that of "linear". "cat" loses nothing: low-rank factors are put beside each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from ..errors import ConfigError
from .config import is_number, require

ARITHMETIC = ("linear", "magnitude_prune", "dare_linear", "ties", "dare_ties")
TYPES = ("svd", "cat", *ARITHMETIC, *(f"{name}_svd" for name in ARITHMETIC[1:]))


@dataclass(frozen=True)
class Combination:
    """A way to combine, by the names of PEFT's `add_weighted_adapter`; `ConfigError` for one that there is not."""

    combination_type: str = "svd"
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_full_matrices: bool = True
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: str = "total"

    def __post_init__(self) -> None:
        named, r, clamp = self.combination_type, self.svd_rank, self.svd_clamp
        require(named in TYPES, "combination_type", named, f"one of {', '.join(TYPES)}")
        whole = isinstance(r, int) and not isinstance(r, bool) and r > 0
        require(r is None or whole, "svd_rank", r, "a positive int or None")
        require(clamp is None or (is_number(clamp) and 0 <= clamp <= 1), "svd_clamp", clamp, "between 0 and 1, or None")
        some = is_number(self.density) and 0 < self.density <= 1  # type: ignore[operator]
        require(some or not self.prunes, "density", self.density, f"above 0 and at most 1 for {named!r}")
        method = self.majority_sign_method
        require(method in ("total", "frequency"), "majority_sign_method", method, '"total" or "frequency"')

    @property
    def arithmetic(self) -> str:
        """One of `ARITHMETIC`."""
        return "linear" if self.combination_type in ("svd", "cat") else self.combination_type.removesuffix("_svd")

    @property
    def prunes(self) -> bool:
        """Whether entries are dropped before anything is added, so that it needs a `density`."""
        return self.arithmetic != "linear"

    @property
    def decomposes(self) -> bool:
        """Whether it acts on whole changes of weights, which are decomposed afterwards."""
        return self.combination_type.endswith("svd")

    def of_one(self) -> Self:
        """The way to combine a single adapter, which PEFT only ever multiplies."""
        return replace(self, combination_type="linear")

    def combined(self, tensors: Sequence[Tensor], weights: Sequence[float], rng: torch.Generator | None) -> Tensor:
        """Tensors of one shape as one, of that shape and dtype. Without `rng`, torch's global generator draws."""
        prune = self._dropped if self.arithmetic.startswith("dare") else self._largest
        kept = torch.stack([prune(tensor, rng) if self.prunes else tensor for tensor in tensors])
        weighted = kept * torch.tensor(weights, dtype=kept.dtype, device=kept.device).view(-1, *[1] * (kept.dim() - 1))
        if not self.arithmetic.endswith("ties"):
            return weighted.sum(0)
        total = (kept if self.majority_sign_method == "total" else kept.sign()).sum(0)
        agree = kept.sign() == torch.where(total >= 0, 1, -1)
        return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)

    def _largest(self, tensor: Tensor, _: torch.Generator | None) -> Tensor:
        assert self.density is not None
        kept = tensor.abs().flatten().topk(int(self.density * tensor.numel())).indices
        return tensor * torch.zeros_like(tensor).flatten().index_fill(0, kept, 1).view_as(tensor)

    def _dropped(self, tensor: Tensor, rng: torch.Generator | None) -> Tensor:
        assert self.density is not None
        if self.density == 1:
            return tensor
        # drawn on the CPU: the same random numbers, whatever the device
        kept = torch.bernoulli(torch.full(tensor.shape, self.density, dtype=tensor.dtype, device="cpu"), generator=rng)
        return tensor * kept.to(tensor.device) / self.density

    def factors(self, matrix: Tensor, r: int) -> tuple[Tensor, Tensor]:
        """A (k, in) and B (out, k), with B A as near to a matrix (out, in) as rank k = min(r, in, out) allows.

        The singular values are in B. With `svd_clamp` both are cut at that quantile of all their entries, and at its
        negative. Raises `ConfigError` for a driver that torch does not have there.
        """
        try:
            u, s, vh = torch.linalg.svd(matrix, full_matrices=self.svd_full_matrices, driver=self.svd_driver)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"`svd_driver={self.svd_driver!r}` did not decompose the update: {error}") from error
        k = min(r, len(s))
        a, b = vh[:k], u[:, :k] * s[:k]
        if self.svd_clamp is not None:
            limit = torch.quantile(torch.cat([b.flatten(), a.flatten()]), self.svd_clamp)
            a, b = a.clamp(-limit, limit), b.clamp(-limit, limit)
        return a, b
