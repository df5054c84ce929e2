"""What rounding took: the few bits that W + ΔW and ΔW do not tell about W.

After W' = round(W + ΔW), the guess P = round(W' - ΔW) is W in most places and a few representable numbers away in the
rest. Floats of one sign are ordered like their bit patterns, so W - P, counted in representable numbers, is a small
integer there: two bits say that it is -1, 0 or 1, or that it is kept in full.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        return cls(_pack(codes), _taken(difference, codes[: bits.numel()], _FULL))

    def restore(self, guess: Tensor) -> Tensor:
        """The original, given the same guess, which may be written over."""
        bits = _bits(guess)
        codes = _unpack(self.codes)[: bits.numel()]
        bits += codes
        if self.full.numel():
            _add_where(bits, codes, -_FULL, self.full + _FULL)
        return bits.view(guess.dtype).view(guess.shape)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(_INTEGER[tensor.dtype])


def _pack(codes: Tensor) -> Tensor:
    """(4 n,) of codes from 0 to 3 to (n,) of bytes."""
    one, two, three, four = codes.view(torch.uint8).view(4, -1)
    return torch.add(one, two, alpha=4).add_(three, alpha=16).add_(four, alpha=64)


def _unpack(packed: Tensor) -> Tensor:
    """(n,) of bytes to (4 n,) of codes from -2 to 1: a shift to the left and one to the right repeat the sign."""
    last = packed.view(torch.int8)
    return torch.cat([last << 6, last << 4, last << 2, last]).bitwise_right_shift_(6)


# On a CPU it is numpy that looks for a code, since torch takes five times as long there.


def _taken(values: Tensor, codes: Tensor, code: int) -> Tensor:
    if values.is_cpu:
        return torch.from_numpy(values.numpy()[codes.numpy() == code])
    return values[codes == code]


def _add_where(values: Tensor, codes: Tensor, code: int, added: Tensor) -> None:
    if values.is_cpu:
        values.numpy()[codes.numpy() == code] += added.numpy()
    else:
        values[codes == code] += added
