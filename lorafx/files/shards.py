"""safetensors files read and written piece by piece, so that no more of them than a block is in memory.

The library reads through a memory map, whose pages count as the process's own, and writes from tensors that are all
there at once. The format is simple: eight bytes with the length of a header, the header in JSON (of each tensor dtype,
shape and place), then the numbers.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError

# By the format's names, in the order in which the library writes them: later ones first, then by the tensors' names.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = {name: place for place, name in enumerate(DTYPES)}
_CHUNK = 1 << 24  # bytes copied at a time


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: the format's name of its dtype, its shape, its bytes, and where in the file they begin."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    begin: int = 0

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype; None for one that torch does not have."""
        return DTYPES.get(self.dtype)

    @property
    def rows(self) -> int:
        """The length of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    def cast(self, dtype: torch.dtype) -> Entry:
        """The same tensor in another dtype."""
        return replace(self, dtype=_NAMES[dtype], nbytes=math.prod(self.shape) * dtype.itemsize)

    @classmethod
    def of(cls, tensor: Tensor) -> Entry:
        """The entry of a tensor that is to be written."""
        return cls(_NAMES[tensor.dtype], tuple(tensor.shape), tensor.numel() * tensor.element_size())


@dataclass(frozen=True)
class Shard:
    """A safetensors file: its tensors by key, and what else its header says."""

    file: Path
    entries: dict[str, Entry]
    metadata: dict[str, str] | None

    @classmethod
    def read(cls, file: Path) -> Shard:
        """Read a file's header. Raises `CheckpointError`, naming the file, for one that is missing or damaged."""
        try:
            with safe_open(file, "pt"):  # the library checks that header and length agree
                pass
            with open(file, "rb") as source:
                length = int.from_bytes(source.read(8), "little")
                header = json.loads(source.read(length))
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        metadata = header.pop("__metadata__", None)
        return cls(file, {key: _entry(value, 8 + length) for key, value in header.items()}, metadata)

    def tensor(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of a tensor, from `start` to `stop`, on the CPU; of a scalar, itself."""
        entry = self.entries[key]
        assert entry.torch_dtype is not None, f"{key} is {entry.dtype}"
        stop = entry.rows if stop is None else stop
        shape = (stop - start, *entry.shape[1:]) if entry.shape else ()
        tensor = torch.empty(shape, dtype=entry.torch_dtype, device="cpu")
        row = entry.nbytes // max(entry.rows, 1)
        with open(self.file, "rb", buffering=0) as source:
            source.seek(entry.begin + start * row)
            _fill(source, bytes_of(tensor), f"{self.file}: {key}")
        return tensor

    def chunks(self, key: str) -> Iterator[memoryview]:
        """A tensor's bytes as they are, in pieces."""
        entry = self.entries[key]
        with open(self.file, "rb", buffering=0) as source:
            source.seek(entry.begin)
            for start in range(0, entry.nbytes, _CHUNK):
                piece = memoryview(bytearray(min(_CHUNK, entry.nbytes - start)))
                _fill(source, piece, f"{self.file}: {key}")
                yield piece


def _entry(value: Mapping[str, Any], data: int) -> Entry:
    begin, end = value["data_offsets"]
    return Entry(value["dtype"], tuple(value["shape"]), end - begin, data + begin)


def _fill(source: Any, place: memoryview, what: str) -> None:
    """Read as many bytes as there is place for: the system may give less at a time."""
    while len(place):
        count = source.readinto(place)
        if not count:
            raise CheckpointError(f"{what} ends before its time: the file has been cut off while it was read")
        place = place[count:]


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's numbers, shared with it where they lie in order."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def same_bytes(a: Shard, key: str, b: Shard, other: str) -> bool:
    """Whether two stored tensors are the same, read side by side."""
    one, two = a.entries[key], b.entries[other]
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    return all(x == y for x, y in zip(a.chunks(key), b.chunks(other)))


def write(
    file: Path,
    entries: Mapping[str, Entry],
    metadata: Mapping[str, str] | None,
    pieces: Callable[[str], Iterable[memoryview]],
    done: Callable[[int], object] = lambda count: None,
) -> None:
    """Write a file as the safetensors library would, and wait until the disk has it.

    `pieces` gives the bytes of the tensor at a key; they are asked for one tensor at a time, in the order of the file.
    `done` is told how many bytes were written.
    """
    with open(file, "wb") as out:
        done(out.write(_header(entries, metadata)))
        for key in _ordered(entries):
            before = out.tell()
            for piece in pieces(key):
                done(out.write(piece))
            assert out.tell() - before == entries[key].nbytes, key
        out.flush()
        os.fsync(out.fileno())


def content(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> list[bytes | memoryview]:
    """A file of these tensors as the safetensors library would write it, in pieces that share the tensors' memory."""
    entries = {key: Entry.of(tensor) for key, tensor in tensors.items()}
    return [_header(entries, metadata), *(bytes_of(tensors[key]) for key in _ordered(entries))]


def size(entries: Mapping[str, Entry], metadata: Mapping[str, str] | None) -> int:
    """How many bytes `write` writes."""
    return len(_header(entries, metadata)) + sum(entry.nbytes for entry in entries.values())


def _ordered(entries: Mapping[str, Entry]) -> list[str]:
    return sorted(entries, key=lambda key: (-_ORDER.get(entries[key].dtype, -1), key))


def _header(entries: Mapping[str, Entry], metadata: Mapping[str, str] | None) -> bytes:
    """The header with its length, padded with spaces so that the numbers begin at a multiple of eight."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    begin = 0
    for key in _ordered(entries):
        entry = entries[key]
        header[key] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [begin, begin + entry.nbytes]}
        begin += entry.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
