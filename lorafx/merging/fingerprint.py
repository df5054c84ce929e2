"""Fingerprints: some bytes or numbers that tell whether every bit of a tensor is what it was.

In the host's memory it is a hash of 128 bits, which takes no longer than reading does. Elsewhere it is the bytes of a
tensor, as rows of 4096, times a fixed random matrix of small integers: eight sums a row, which are exact on every
processor. A change of a row, whatever it is, leaves one of its sums as it was with a chance of 1 in 127, all eight with
one of 1 in 2⁵⁵. Products of bytes are made for inference in 8 bits: nothing else in torch reads a GPU's memory as fast.
"""

from __future__ import annotations

import functools

import torch
import xxhash
from torch import Tensor
from torch.nn import functional as F

from ..torch_private.tensors import product_of_bytes

Fingerprint = bytes | Tensor  # a hash, or sums, (rows, 8) of int32
_ROW, _SUMS = 4096, 8
_LARGEST = 63  # a processor may add up two products in 16 bits, where 2 · 255 · 63 still fits
_ROWS_ON_CUDA = 32  # its libraries multiply no fewer


def fingerprint(tensor: Tensor) -> Fingerprint:
    """Of a tensor of any dtype: 16 bytes on a CPU, elsewhere eight sums for each 4096 bytes, on its device."""
    return _hash(tensor) if tensor.is_cpu else _sums(tensor)


def is_of(known: Fingerprint, tensor: Tensor) -> bool:
    """Whether a tensor, which may have come to another device since, has this fingerprint."""
    if isinstance(known, bytes):
        return _hash(tensor.cpu()) == known
    return torch.equal(_sums(tensor), known.to(tensor.device))


def size(known: Fingerprint) -> int:
    """Bytes held."""
    return len(known) if isinstance(known, bytes) else known.nbytes


def _flat(tensor: Tensor) -> Tensor:
    """Its numbers in order, side by side. `view` would leave a single number the stride that it had."""
    return tensor.contiguous().as_strided((tensor.numel(),), (1,))


def _hash(tensor: Tensor) -> bytes:
    return xxhash.xxh3_128_digest(_flat(tensor).view(torch.uint8).numpy().data)


def _sums(tensor: Tensor) -> Tensor:
    data = _flat(tensor).view(torch.int8)
    count = data.numel()
    least = _ROW * _ROWS_ON_CUDA if data.is_cuda else 0
    if (whole := max(count + -count % _ROW, least)) != count:
        data = F.pad(data, (0, whole - count))
    return product_of_bytes(data.view(-1, _ROW), _matrix(data.device))[: -(-count // _ROW)]


@functools.cache
def _matrix(device: torch.device) -> Tensor:
    """(4096, 8): the same numbers in every process."""
    rng = torch.Generator().manual_seed(0)
    numbers = torch.randint(-_LARGEST, _LARGEST + 1, (_SUMS, _ROW), dtype=torch.int8, generator=rng, device="cpu")
    return numbers.to(device).t()
