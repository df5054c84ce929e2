"""Fingerprints: some numbers that tell whether every bit of a tensor is what it was.

The bytes of a tensor, as rows of 4096, times a fixed random matrix of small integers: eight sums a row, which are exact
on every processor. A change of a row, whatever it is, leaves one of its sums as it was with a chance of 1 in 127, all
eight with one of 1 in 2⁵⁵. Products of bytes are made for inference in 8 bits: nothing else in torch reads memory as
fast, on processors and GPUs alike.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from ..torch_private.tensors import product_of_bytes

_ROW, _SUMS = 4096, 8
_LARGEST = 63  # a processor may add up two products in 16 bits, where 2 · 255 · 63 still fits
_ROWS_ON_CUDA = 32  # its libraries multiply no fewer


def fingerprint(tensor: Tensor) -> Tensor:
    """Eight sums for each 4096 bytes of a tensor of any dtype: (rows, 8) of int32, on its device."""
    data = tensor.reshape(-1).view(torch.int8)
    count = data.numel()
    least = _ROW * _ROWS_ON_CUDA if data.is_cuda else 0
    if (whole := max(count + -count % _ROW, least)) != count:
        data = F.pad(data, (0, whole - count))
    return product_of_bytes(data.view(-1, _ROW), _matrix(data.device))[: -(-count // _ROW)]


@functools.cache
def _matrix(device: torch.device) -> Tensor:
    """(4096, 8): the same numbers in every process."""
    rng = torch.Generator().manual_seed(0)
    numbers = torch.randint(-_LARGEST, _LARGEST + 1, (_SUMS, _ROW), dtype=torch.int8, generator=rng)
    return numbers.to(device).t()
