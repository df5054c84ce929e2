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


@dataclass(frozen=True)
class Residual:
    """W given P: two bits of each difference, four in a byte, and the rest of those that have more, with places."""

    codes: Tensor
    places: Tensor
    rest: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.codes.nbytes + self.places.nbytes + self.rest.nbytes

    @classmethod
    def of(cls, original: Tensor, guess: Tensor) -> Residual:
        """Encode `original` against `guess`, both of the same shape and dtype; the guess may be written over."""
        above = _bits(guess)  # from here on, how far the guess is above the least; it wraps around, as what undoes it
        above.sub_(_bits(original)).sub_(_LEAST)
        places = _large(above)
        return cls(_packed(above.to(torch.int8)), places, above.index_select(0, places).bitwise_and_(~3))

    def restore(self, guess: Tensor) -> Tensor:
        """The original, given the same guess, which may be written over."""
        bits = _bits(guess)
        codes, places, rest = (part.to(bits.device) for part in (self.codes, self.places, self.rest))
        _subtract(bits, _unpacked(codes)[: bits.numel()])
        bits.index_add_(0, places, rest, alpha=-1)
        return bits.view(guess.dtype).view(guess.shape)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(_INTEGER[tensor.dtype])


def _array(tensor: Tensor) -> Array:
    return tensor.numpy() if tensor.is_cpu else tensor


def _large(above: Tensor) -> Tensor:
    """The places of what is not 0, 1, 2 or 3."""
    array = _array(above)
    if isinstance(array, Tensor):
        places = ((array < 0) | (array > 3)).nonzero()[:, 0]
    else:
        places = torch.from_numpy(np.flatnonzero(array.view(f"u{array.itemsize}") > 3))
    return places.int() if above.numel() < 2**31 else places


def _subtract(integers: Tensor, codes: Array) -> None:
    """Take from integers what their codes, which are written over, say."""
    array = _array(integers)
    codes += _LEAST
    array -= codes


def _packed(codes: Tensor) -> Tensor:
    """Bytes, (n,), whose lowest two bits are codes, to bytes of four codes: one of each quarter of them."""
    array = _array(codes)
    array &= 3
    count = -(-len(array) // 4)
    packed = array[:count] | 0
    for quarter in (1, 2, 3):
        part = array[quarter * count : (quarter + 1) * count]
        packed[: len(part)] |= part * 4**quarter
    return torch.as_tensor(packed)


def _unpacked(packed: Tensor) -> Array:
    """The reverse, to at most three more codes."""
    array = _array(packed)
    quarters = [array >> shift for shift in (0, 2, 4, 6)]
    codes = torch.cat(quarters) if isinstance(array, Tensor) else np.concatenate(quarters)
    codes &= 3
    return codes
