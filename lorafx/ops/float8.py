"""float8: matrices of numbers of 8 bits with a scale for each row, and products of two of them.

    A  ≈  diag(s) Q                    Q of float8_e4m3fn, s of float32
    diag(s) P (diag(t) Q)ᵀ  =  s_i (P Qᵀ)_ij t_j

e4m3 has four significant bits from 2⁻⁶ to 448, so a number is off by at most 1/16 of itself, unless it is less than
2⁻¹³ of its row's largest. A weight's scales are powers of two: what it stands for is then exact in bfloat16, float32
and float64, and multiplying by a scale rounds nothing. Activations and gradients, which are rounded anew in each call,
have the scale that makes a row's largest number 448 (as in SwitchBack: Wortsman et al., 2023, arXiv 2304.13013).

GPUs from capability 8.9 on multiply P and Q as they are, up to twice as fast as bfloat16; Hopper's need rows of both,
not columns, to lie in one piece. Everywhere else the same numbers are multiplied in float32 (float64 for float64).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .library import composite

aten = torch.ops.aten
E4M3, LARGEST = torch.float8_e4m3fn, 448.0
MULTIPLE = 16  # of which both sizes of a weight must be multiples, for a GPU's products
_LEAST = 2.0**-100  # a row of smaller numbers is scaled as if this were its largest: scales stay normal float32
LEAST_CAPABILITY = 8, 9  # of a CUDA device that has products of float8


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Q (…, k) and s (…, 1) of x (…, k): each row scaled so that its largest number is 448, then rounded."""
    scale = _shared_scale([x])
    return (x / scale).to(E4M3), scale


def _shared_scale(matrices: Sequence[Tensor]) -> Tensor:
    """(…, 1): for each row of matrices side by side, the scale that makes its largest number 448."""
    largest = functools.reduce(torch.maximum, [each.abs().amax(-1, keepdim=True) for each in matrices])
    return largest.float().clamp(min=_LEAST) / LARGEST


def packed(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Q (n, k) and s (n,) of a weight (n, k): s is the least power of two for which no number exceeds 448."""
    least = weight.abs().amax(1).float().clamp(min=_LEAST) / LARGEST
    exponent = (least.view(torch.int32) + 0x7FFFFF) >> 23  # of the next power of two
    scale = (exponent << 23).view(torch.float32)
    return (weight / scale[:, None]).to(E4M3), scale


def from_float8(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """diag(s) Q in a wider dtype: (n, k) of `weight` Q (n, k) in float8 and `scale` s (n,)."""
    return weight.to(dtype) * scale.to(dtype).unsqueeze(1)


composite("from_float8(Tensor weight, Tensor scale, ScalarType dtype) -> Tensor", from_float8)


def product(left: Tensor, scale: Tensor, right: Tensor, right_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """diag(scale) left (diag(right_scale) right)ᵀ (m, n) in a wider dtype.

    left (m, k) and right (n, k) are float8 and contiguous, the scales (m, 1) and (n,) float32. A GPU adds up in fewer
    than 32 bits ("fast accumulation"), for else its products are slow, and rounding the factors costs more.
    """
    if dtype == torch.bfloat16 and multiplies(left.device) and not any(size % MULTIPLE for size in right.shape):
        left = left.as_strided(left.shape, (left.shape[1], 1))  # as it is; or Inductor copies it for each product
        given = left, right.t(), scale, right_scale.unsqueeze(0)
        return aten._scaled_mm.default(*given, None, None, dtype, True)
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast(left.device.type, enabled=False):
        return (left.to(wide) @ right.to(wide).t() * scale * right_scale).to(dtype)


def multiplies(device: torch.device) -> bool:
    """Whether a device has products of float8."""
    return device.type == "cuda" and capability(device) >= LEAST_CAPABILITY


@functools.cache  # a device stays the same
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def layer(rounded: tuple[Tensor, Tensor], weight: Tensor, scale: Tensor, bias: Tensor | None, like: Tensor) -> Tensor:
    """x̂ Wᵀ + b (m, n) in the dtype of `like` and in memory of its own, of what `quantised` makes of x (m, k)."""
    y = product(*rounded, weight, scale, like.dtype)
    return y if bias is None else y.add_(bias)


def through(dys: Sequence[Tensor], weights: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
    """Σ dyᵢ Wᵢ (m, k) of dyᵢ (m, nᵢ), Wᵢ (nᵢ, k) in float8 and their scales (nᵢ,): one product.

        [dy₁ diag(s₁)  dy₂ diag(s₂) …] [Q₁ᵀ Q₂ᵀ …]ᵀ        the left factor rounded to float8 row by row

    A sum over n may only have scales that do not depend on n, so those of the weights go to the dyᵢ. The right factor
    is a copy, made here and gone afterwards: keeping one of all weights would take as much memory as bfloat16 does.
    """
    scaled = [dy * scale.to(dy.dtype) for dy, scale in zip(dys, scales)]
    shared = _shared_scale(scaled)
    left = torch.cat([(each / shared).to(E4M3) for each in scaled], -1)
    columns = torch.cat([weight.view(torch.uint8).t() for weight in weights], 1)  # as bytes, which are only copied
    ones = torch.ones(columns.shape[0], dtype=torch.float32, device=columns.device)
    return product(left, shared, columns.contiguous().view(E4M3), ones, dys[0].dtype)
