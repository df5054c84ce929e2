"""fourier_linear: a linear layer whose weight is the inverse Fourier transform of a few numbers.

    W = Re(ifft2(C))            C (out, in), of c_k at row u_k and column v_k, and zeros
    y_o = Σ_k c_k Re(e^(-2πi u_k o / out) · fft(x)[v_k]) / (in · out)

So W is not made: x is transformed, each c_k takes its frequency to a frequency of y, and that is transformed back. It
takes in · log in, n, and out · log out operations a token, instead of in · out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import composite


def reference(x: Tensor, spectrum: Tensor, places: Tensor, features: int) -> Tensor:
    """With the weight in memory."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, spectrum.dtype), torch.float32)
    return x.to(dtype) @ fourier_weight(spectrum.to(dtype), places, (features, x.shape[-1])).t()


def fourier_weight(spectrum: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """W (out, in) of `spectrum` (n,), in float32 or float64, at `places` (2, n) of rows and columns."""
    dense = spectrum.new_zeros(shape).index_put((places[0], places[1]), spectrum)
    return torch.fft.ifft2(dense).real


def fourier_linear(x: Tensor, spectrum: Tensor, places: Tensor, features: int) -> Tensor:
    """y = x Wᵀ (…, features) of x (…, in), `spectrum` (n,) and `places` (2, n) of rows and columns, which are integers.

    Of any floating dtypes; it is computed and given in float32 or, where one of them is, float64: transforms have no
    half precision. Any device.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, spectrum.dtype), torch.float32)
    found = torch.fft.fft(x.to(dtype)).index_select(-1, places[1]) * spectrum.to(dtype)
    sums = found.new_zeros(*x.shape[:-1], features).index_add(-1, places[0], found)
    return torch.fft.fft(sums).real / (x.shape[-1] * features)


composite("fourier_linear(Tensor x, Tensor spectrum, Tensor places, SymInt features) -> Tensor", fourier_linear)
