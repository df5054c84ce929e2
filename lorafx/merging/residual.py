"""What rounding took: the few bits that W + ΔW and ΔW do not tell about W.

After W' = round(W + ΔW), the guess P = round(W' - ΔW) is W in most places and a few representable numbers away in the
rest. Floats of one sign are ordered like their bit patterns, so W - P, counted in representable numbers, is a small
integer there. It is kept in a byte, next to its place in two; the rare one that needs more is kept in full.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_INTEGER = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16}
_INTEGER[torch.bfloat16] = torch.int16
_FULL = -128  # the byte of a difference that is kept in full
_NEAR = 2**16  # elements, of which two bytes tell the place


def supports(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype can be restored from a residual."""
    return dtype in _INTEGER


@dataclass(frozen=True)
class Residual:
    """W given P: the places where they differ, a byte for each difference, and those kept in full."""

    places: Tensor
    differences: Tensor
    full: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.places.nbytes + self.differences.nbytes + self.full.nbytes

    @classmethod
    def of(cls, original: Tensor, guess: Tensor) -> Residual:
        """Encode `original` against `guess`, both of the same shape and dtype."""
        bits, guessed = _bits(original), _bits(guess)
        places = _unequal(bits, guessed)
        difference = bits[places] - guessed[places]  # it wraps around, as does the sum that undoes it
        short = difference.clamp(_FULL, -_FULL).to(torch.int8)  # 128 wraps around to -128
        return cls(places.to(_place_dtype(bits)), short, difference[short == _FULL])

    def restore(self, guess: Tensor) -> Tensor:
        """The original, given the same guess, which is written over if it is contiguous."""
        bits = _bits(guess)
        places = self.places.long()
        if self.places.dtype == torch.int16:
            places &= _NEAR - 1
        difference = self.differences.to(bits.dtype)
        if self.full.numel():
            difference[self.differences == _FULL] = self.full
        bits[places] += difference
        return bits.view(guess.dtype).view(guess.shape)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(_INTEGER[tensor.dtype])


def _place_dtype(bits: Tensor) -> torch.dtype:
    return torch.int16 if bits.numel() <= _NEAR else torch.int32 if bits.numel() < 2**31 else torch.int64


def _unequal(some: Tensor, others: Tensor) -> Tensor:
    """The places where two tensors differ; by numpy on a CPU, where torch takes several times as long."""
    if some.is_cpu:
        return torch.from_numpy(np.flatnonzero(some.numpy() != others.numpy()))
    return (some != others).nonzero().view(-1)
