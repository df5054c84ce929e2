"""What rounding took: the few bits that W + ΔW and ΔW do not tell about W.

After W' = round(W + ΔW), the guess P = round(W' - ΔW) is W in most places and a few representable numbers away in the
rest. Floats of one sign are ordered like their bit patterns, so P - W, counted in representable numbers, is a small
integer there: two bits are enough for -1, 0, 1 and 2. Of others these are the lowest bits, and the rest of them is kept
with their places.

On a CPU it is numpy that looks for places and handles bytes: there are many short operations, and it begins one in a
fraction of the time that torch takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_INTEGER = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16}
_INTEGER[torch.bfloat16] = torch.int16
_LEAST = -1  # of the four differences that two bits tell

Array = Any  # numpy's on a CPU, elsewhere a tensor: the same lines do for both


def supports(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype can be restored from a residual."""
    return dtype in _INTEGER


@dataclass(slots=True)
class Residual:
    """W given P: two bits of each difference, four in a byte, and the rest of those that have more, with places."""

    codes: Array
    places: Array
    rest: Array

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.codes.nbytes + self.places.nbytes + self.rest.nbytes

    @classmethod
    def of(cls, original: Tensor, guess: Tensor) -> Residual:
        """Encode `original` against `guess`, both of the same shape and dtype; the guess may be written over."""
        above = _array(_bits(guess))  # from here on, how far it is above the least; that wraps around, as its reverse
        above -= _array(_bits(original))
        above -= _LEAST
        places = _large(above)
        return cls(_packed(_bytes(above)), places, above[places] & ~3)

    def restore(self, guess: Tensor) -> Tensor:
        """The original, given the same guess, which may be written over."""
        bits = _bits(guess)
        integers = _array(bits)
        codes, places, rest = (_beside(integers, part) for part in (self.codes, self.places, self.rest))
        differences = _unpacked(codes)[: len(integers)]
        differences += _LEAST
        integers -= differences
        integers[places] -= rest
        return bits.view(guess.dtype).view(guess.shape)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(_INTEGER[tensor.dtype])


def _array(tensor: Tensor) -> Array:
    return tensor.numpy() if tensor.is_cpu else tensor


def _beside(there: Array, part: Array) -> Array:
    """A part of a residual where the guess is, which may have come to another device since."""
    if type(part) is type(there):
        return part.to(there.device) if isinstance(part, Tensor) else part
    return torch.as_tensor(part, device=there.device) if isinstance(there, Tensor) else part.cpu().numpy()


def _large(above: Array) -> Array:
    """The places of what is not 0, 1, 2 or 3."""
    if isinstance(above, Tensor):
        found = ((above < 0) | (above > 3)).nonzero()[:, 0]
        return found.int() if above.numel() < 2**31 else found
    places = np.flatnonzero(above.view(f"u{above.itemsize}") > 3)
    return places.astype(np.int32) if above.size < 2**31 else places


def _bytes(integers: Array) -> Array:
    return integers.to(torch.int8) if isinstance(integers, Tensor) else integers.astype(np.int8)


def _packed(codes: Array) -> Array:
    """Bytes, (n,), whose lowest two bits are codes, to bytes of four codes: one of each quarter of them."""
    codes &= 3
    count = -(-len(codes) // 4)
    packed = codes[:count] | 0
    for quarter in (1, 2, 3):
        part = codes[quarter * count : (quarter + 1) * count]
        packed[: len(part)] |= part * 4**quarter
    return packed


def _unpacked(packed: Array) -> Array:
    """The reverse, to at most three more codes."""
    quarters = [packed >> shift for shift in (0, 2, 4, 6)]
    codes = torch.cat(quarters) if isinstance(packed, Tensor) else np.concatenate(quarters)
    codes &= 3
    return codes
