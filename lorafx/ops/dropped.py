"""dropped: dropout by a seed. Which elements are left out is decided anew wherever it is asked, and never kept.

z = x m / q        m: 1 with probability q = 1 - p, by random numbers that the seed alone decides; 0 otherwise

torch's own dropout keeps m, and whoever multiplies z keeps z. On a CPU it also draws a number of 53 bits for each
element, one after another; here four elements share one of 64 bits, and p is rounded to a multiple of 2⁻¹⁶ for that:
16.7 ms become 4.4 for 1024 rows of 1376 on two cores. The seed comes from torch's default generator, so that
`manual_seed`, and checkpointing with its random state, repeat it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .calls import is_plain

_STEPS = 2**16


def can_drop(x: Tensor, p: float) -> bool:
    """Whether to go by seeds: not under a compiler, nor where a CUDA graph would repeat one seed for ever."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return is_plain(x) and (x.is_cpu or x.is_cuda) and 0 < round(p * _STEPS) < _STEPS


def new_seed() -> int:
    """The next seed of torch's default generator."""
    return int(torch.randint(2**63 - 1, ()))


def kept(p: float) -> float:
    """q."""
    return 1 - round(p * _STEPS) / _STEPS


def dropped(x: Tensor, p: float, seed: int) -> Tensor:
    """Where x is left out, as booleans of its shape."""
    generator = torch.Generator(x.device).manual_seed(seed)
    if x.is_cuda:  # where drawing is cheap, and memory is not
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - kept(p), generator=generator)
    numbers = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return (numbers.view(torch.int16)[: x.numel()] < round(p * _STEPS) - _STEPS // 2).view(x.shape)
