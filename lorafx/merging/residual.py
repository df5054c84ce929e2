"""What rounding took: the few bits that W + ΔW and ΔW do not tell about W.

After W' = round(W + ΔW), the guess P = round(W' - ΔW) is W in most places and a few representable numbers away in the
rest. Floats of one sign are ordered like their bit patterns, so W - P, counted in representable numbers, is a small
integer there: two bits say that it is -1, 0 or 1, or that it is kept in full.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_INTEGER = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16}
_INTEGER[torch.bfloat16] = torch.int16
_FULL = 2  # of the codes 0, 1, 2 and 3 of two bits, of which 3 stands for -1


def supports(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype can be restored from a residual."""
    return dtype in _INTEGER


@dataclass(frozen=True)
class Residual:
    """W given P: the codes of two bits, four in a byte, and in their order the differences kept in full."""

    codes: Tensor
    full: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.codes.nbytes + self.full.nbytes

    @classmethod
    def of(cls, original: Tensor, guess: Tensor) -> Residual:
        """Encode `original` against `guess`, both of the same shape and dtype; the guess may be written over."""
        bits, difference = _bits(original), _bits(guess)
        torch.sub(bits, difference, out=difference)  # it wraps around, as does the sum that undoes it
        codes = difference.clamp(-_FULL, _FULL).to(torch.int8)
        if odd := -bits.numel() % 4:
            codes = F.pad(codes, (0, odd))
        codes &= 3  # both 2 and -2, which stand for all that is larger, are the code 2
        full = difference.take(_where(codes, _FULL))
        return cls(_packed(codes), full)

    def restore(self, guess: Tensor) -> Tensor:
        """The original, given the same guess, which may be written over."""
        bits = _bits(guess)
        codes = _unpacked(self.codes)[: bits.numel()]
        _add(bits, codes)
        if self.full.numel():
            bits.index_add_(0, _where(codes, -_FULL), self.full + _FULL)
        return bits.view(guess.dtype).view(guess.shape)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(_INTEGER[tensor.dtype])


def _packed(codes: Tensor) -> Tensor:
    """(4 n,) of codes from 0 to 3, which are written over, to (n,) of bytes.

    One product moves the four of a word side by side into its highest byte, and what else it makes does not touch them.
    """
    codes.view(torch.int32).mul_(2**24 + 2**18 + 2**12 + 2**6)
    return codes.view(torch.uint8)[3::4].contiguous()


def _unpacked(packed: Tensor) -> Tensor:
    """(n,) of bytes to (4 n,) of codes from -2 to 1."""
    return _words(packed.device).index_select(0, packed.int()).view(torch.int8)


@functools.cache
def _words(device: torch.device) -> Tensor:
    """(256,): for each byte a word of its four codes, with their signs."""
    shifts = torch.tensor([6, 4, 2, 0], dtype=torch.uint8)
    codes = (torch.arange(256, dtype=torch.uint8)[:, None] << shifts).view(torch.int8) >> 6
    return codes.view(torch.int32)[:, 0].to(device)


# On a CPU it is numpy that looks for a code, and that adds bytes to integers: torch takes some times as long there.


def _where(codes: Tensor, code: int) -> Tensor:
    return torch.from_numpy(np.flatnonzero(codes.numpy() == code)) if codes.is_cpu else (codes == code).nonzero()[:, 0]


def _add(values: Tensor, codes: Tensor) -> None:
    if values.is_cpu:
        np.add(values.numpy(), codes.numpy(), out=values.numpy())
    else:
        values += codes
