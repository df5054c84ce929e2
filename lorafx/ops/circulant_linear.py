"""circulant_linear: a linear layer whose weight is made of circulant blocks, which Fourier transforms make diagonal.

W = [circ(w_mn)] / in,    circ(w)[t, j] = w[(j - t) mod b]        w (out / b, in / b, b)
y_m = irfft(Σ_n rfft(x_n) · conj(rfft(w_mn))) / in                of the blocks of x and y
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import composite


def reference(x: Tensor, kernel: Tensor) -> Tensor:
    """With the weight in memory."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, kernel.dtype), torch.float32)
    return x.to(dtype) @ circulant_weight(kernel.to(dtype)).t()


def circulant_weight(kernel: Tensor) -> Tensor:
    """W (out, in) of its blocks' first rows (out / b, in / b, b)."""
    rows, columns, size = kernel.shape
    number = torch.arange(size, device=kernel.device)
    blocks = kernel[:, :, (number - number[:, None]) % size]
    return blocks.permute(0, 2, 1, 3).reshape(rows * size, columns * size) / (columns * size)


def circulant_linear(x: Tensor, kernel: Tensor) -> Tensor:
    """y = x Wᵀ (…, out) of x (…, in) and `kernel` (out / b, in / b, b), of any floating dtypes.

    It is computed and given in float32 or, where one of them is, float64: transforms have no half precision. Any
    device.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, kernel.dtype), torch.float32)
    _, columns, size = kernel.shape
    blocks = torch.fft.rfft(x.to(dtype).unflatten(-1, (columns, size)))
    sums = torch.einsum("...nk,mnk->...mk", blocks, torch.fft.rfft(kernel.to(dtype)).conj())
    return torch.fft.irfft(sums, n=size).flatten(-2) / (columns * size)


composite("circulant_linear(Tensor x, Tensor kernel) -> Tensor", circulant_linear)
