"""Scratch: memory for what lives no longer than a block, kept from one block to the next.

New memory costs an interrupt for each 4096 bytes, which takes longer than computing on them; and what was written to a
moment ago is still near the processor. Devices whose allocators keep memory themselves are asked each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# (name, shape, dtype, device) -> a tensor of any values, contiguous; the next one of that name may be the same memory.
Memory = Callable[[str, tuple[int, ...], torch.dtype, torch.device], Tensor]


def fresh(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of one's own, for results that somebody keeps."""
    return torch.empty(shape, dtype=dtype, device=device)


class Scratch:
    """Memory by name and dtype, as large as was ever asked for."""

    def __init__(self) -> None:
        self._whole: dict[tuple[str, torch.dtype], Tensor] = {}
        self._parts: dict[tuple[str, torch.dtype, tuple[int, ...]], Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        if device.type != "cpu":
            return fresh(name, shape, dtype, device)
        found = self._parts.get((name, dtype, shape))
        return self._part(name, shape, dtype) if found is None else found

    def _part(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        whole, count = self._whole.get((name, dtype)), math.prod(shape)
        if whole is None or whole.numel() < count:
            whole = self._whole[name, dtype] = torch.empty(count, dtype=dtype, device="cpu")
            self._parts = {key: part for key, part in self._parts.items() if key[:2] != (name, dtype)}
        part = self._parts[name, dtype, shape] = whole[:count].view(shape)
        return part
