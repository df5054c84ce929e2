"""Base models in torch's own files (`pytorch_model.bin`), read as if they were safetensors.

torch maps such a file into memory, so no more of it is read than the rows that are asked for. What it unpickles is
tensors alone.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .shards import Entry, Shard, bytes_of

WHOLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_ROWS = 1 << 24  # bytes of a tensor that are copied at a time, or a row


@dataclass(frozen=True)
class PickledShard(Shard):
    """A file of torch's: its tensors by key, each mapped into memory."""

    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, file: Path) -> PickledShard:
        """Read what there is in a file. Raises `CheckpointError`, naming it, for one that holds other than tensors."""
        try:
            tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{file} cannot be read, as torch's files since version 1.6 can: {str(error).splitlines()[0]}; load "
                "the model with transformers, and save it with save_pretrained"
            ) from error
        if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise CheckpointError(f"{file} holds other things than tensors by name, and is no model's weights")
        entries = {key: Entry.of(tensor) for key, tensor in tensors.items()}
        return cls(file, entries, {"format": "pt"}, dict(tensors))

    def tensor(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of a tensor, from `start` to `stop`; of a scalar, itself."""
        tensor = self.tensors[key].detach()
        return (tensor[start:stop] if tensor.dim() else tensor).clone()

    def chunks(self, key: str) -> Iterator[memoryview]:
        """A tensor's bytes as they are, in pieces."""
        entry = self.entries[key]
        rows = max(1, _ROWS * entry.rows // max(entry.nbytes, 1))
        for start in range(0, entry.rows, rows):
            yield bytes_of(self.tensor(key, start, start + rows))


def name_as_safetensors(name: str) -> str:
    """What transformers calls the file of safetensors that takes the place of one of torch's."""
    return name.replace("pytorch_model", "model", 1).removesuffix(".bin") + ".safetensors"
