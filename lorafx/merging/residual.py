"""What rounding took: the few bits that W + ΔW and ΔW do not tell about W.

After W' = round(W + ΔW), the guess P = round(W' - ΔW) is W in most places and a few representable numbers away in the
rest. Floats of one sign are ordered like their bit patterns, so W - P, counted in representable numbers, is a small
integer: a bit says where it is not zero, a byte says what it is, and the rare value that needs more is kept whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_INTEGER = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16}
_INTEGER[torch.bfloat16] = torch.int16
_WIDE, _ZERO, _LIMIT = -128, -127, 126  # codes: a value kept whole; the original is +0; largest difference in a byte
_CHUNK = 1 << 22


def supports(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype can be restored from a residual."""
    return dtype in _INTEGER


def ordered(tensor: Tensor) -> Tensor:
    """The bits of each float as an integer that grows with the float: neighbours differ by 1."""
    return _flip(tensor.view(_INTEGER[tensor.dtype]))


def _flip(bits: Tensor) -> Tensor:
    """From the bits of floats to integers in the order of the floats, and back: it is its own inverse."""
    largest = torch.iinfo(bits.dtype).max
    return torch.where(bits < 0, bits ^ largest, bits)


@dataclass(frozen=True)
class Residual:
    """W given P: packed bits of where they differ, a byte for each difference, and the values kept whole."""

    differs: Tensor
    codes: Tensor
    wide: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.numel() * part.element_size() for part in (self.differs, self.codes, self.wide))

    @classmethod
    def of(cls, original: Tensor, guess: Tensor) -> Residual:
        """Encode `original` against `guess`, both of the same shape and dtype."""
        original, guess = original.reshape(-1), guess.reshape(-1)
        bits = original.view(_INTEGER[original.dtype])
        difference = ordered(original) - ordered(guess)  # wraps around, as does the sum that undoes it
        differs = difference != 0
        some, values = difference[differs], bits[differs]
        codes = torch.where(some.abs() <= _LIMIT, some, _WIDE)
        codes = torch.where((codes == _WIDE) & (values == 0), _ZERO, codes)
        codes = torch.where(some == torch.iinfo(some.dtype).min, torch.where(values == 0, _ZERO, _WIDE), codes)
        return cls(_pack(differs), codes.to(torch.int8), values[codes == _WIDE].clone())

    def restore(self, guess: Tensor) -> Tensor:
        """The original, given the same guess."""
        flat = ordered(guess.reshape(-1))
        differs = _unpack(self.differs, flat.numel())
        codes = self.codes.to(flat.dtype)
        values = _flip(flat[differs] + codes)
        values[codes == _ZERO] = 0
        values[codes == _WIDE] = self.wide
        bits = _flip(flat)
        bits[differs] = values
        return bits.view(guess.dtype).reshape(guess.shape)


def fingerprint(tensor: Tensor) -> int:
    """A 64-bit hash of a tensor's bits and their places, the same on every device."""
    flat = tensor.detach().contiguous().reshape(-1)
    bits = flat.view(_INTEGER.get(flat.dtype, torch.uint8))
    total = 0
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK].to(torch.int64)
        place = torch.arange(start + 1, start + 1 + part.numel(), device=part.device, dtype=torch.int64)
        mixed = (part ^ (place * -7046029254386353131)) * -4417276706812531889
        total += int((mixed ^ (mixed >> 29)).mul(-2643881736870682267).sum())
    return total & (1 << 64) - 1


def _pack(mask: Tensor) -> Tensor:
    padded = torch.zeros((mask.numel() + 7) // 8 * 8, dtype=torch.uint8, device=mask.device)
    padded[: mask.numel()] = mask
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.view(-1, 8) * weights).sum(1, dtype=torch.uint8)


def _unpack(packed: Tensor, count: int) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed[:, None] >> shifts & 1).reshape(-1)[:count].bool()
