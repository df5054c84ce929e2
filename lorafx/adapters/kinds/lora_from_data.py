"""Start values of LoRA that come out of data: of what layers are given, or of the gradients of their weights.

corda     W C = U S Vᵀ, with C the mean of xᵀ x over what a layer is given:
          B A = U S Vᵀ C⁻¹ of r of these    (Yang et al., arXiv 2406.05223)
lora_ga   ∂L/∂W = U S Vᵀ: A is r rows of Vᵀ, B r columns of U S    (Wang et al., arXiv 2407.05000)

Both are taken out of the weight, which is left with the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Their names, and which of lorafx's functions asks the data.
FROM_DATA = {
    "corda": "preprocess_corda(model, config, run_model)",
    "lora_ga": "preprocess_loraga(model, config, train_step)",
}


def from_data(
    weight: Tensor,
    found: Tensor,
    r: int,
    scaling: float,
    init: str,
    how: Mapping[str, Any],
    rng: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) for a dense weight (out, in), of its dtype.

    `found` is C, (in, in), or the gradient, (out, in); `how` has the numbers of `corda_config` or `lora_ga_config`.
    """
    found = found.to(weight)
    if init == "corda":
        return _corda(weight, found, r, scaling, how["corda_method"])
    return _lora_ga(weight, found, r, scaling, how, rng)


def _corda(weight: Tensor, covariance: Tensor, r: int, scaling: float, method: str) -> tuple[Tensor, Tensor]:
    """The r largest of W C, which the data uses most ("ipm"), or the r smallest, which it uses least ("kpm")."""
    covariance, inverse = _inverted(covariance)
    u, s, vh = torch.linalg.svd(weight @ covariance, full_matrices=False)
    chosen = slice(0, r) if method == "ipm" else slice(len(s) - r, None)
    root = (s[chosen] / scaling).sqrt()
    return root[:, None] * (vh[chosen] @ inverse), u[:, chosen] * root


def _inverted(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix with so much added to its diagonal that it can be inverted, and its inverse."""
    eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    damp = 0.01 * covariance.diagonal().mean()
    while True:
        damped = covariance + damp * eye
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, eye) < 0.05:
            return damped, inverse
        damp = 2 * damp


def _lora_ga(
    weight: Tensor, gradient: Tensor, r: int, scaling: float, how: Mapping[str, Any], rng: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    with torch.random.fork_rng(enabled=rng is not None):
        if rng is not None:  # torch's function draws from its global generator
            torch.manual_seed(int(torch.randint(2**62, (), generator=rng)))
        u, s, v = torch.svd_lowrank(gradient, min(4 * r, *gradient.shape), niter=4)
        for_a, for_b = _chosen(how["direction"], r)
        a, b = v.t()[for_a], u[:, for_b] * s[for_b]
        if how["scale"] == "stable":
            b = b * (len(weight) ** 0.25 / how["stable_gamma"] ** 0.5)
        elif how["scale"] == "weight_svd":
            largest = torch.svd_lowrank(weight, r, niter=4)[1][0]
            b = b * (largest / s[for_b][0])
        elif how["scale"] == "gd_scale":
            a, b = a / scaling, b / scaling
    return a, b


def _chosen(direction: str, r: int) -> tuple[Tensor, Tensor]:
    """Which of the 2 r largest singular vectors A is made of, and which B."""
    numbers = torch.arange(2 * r)
    if direction == "random":
        numbers = torch.randperm(2 * r)[:r]
        return numbers, numbers
    return {
        "ArB2r": (numbers[:r], numbers[r:]),
        "A2rBr": (numbers[r:], numbers[:r]),
        "ArBr": (numbers[1::2], numbers[::2]),
    }[direction]
