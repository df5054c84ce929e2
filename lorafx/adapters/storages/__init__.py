"""Storages: ways of keeping a weight in memory, one file each.

A storage finds the weights that a module keeps in its way, says their shape and dtype when dense, and goes from the
stored tensors to a dense weight and back. `register` adds a storage of your own.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..readings import Reading
from .dense import DENSE, Dense
from .float8 import FLOAT8, Float8, Float8Linear
from .storage import Storage

# The first that finds a weight in a module says how it is stored; those that `register` adds are asked first.
STORAGES: list[Storage] = [FLOAT8, DENSE]


def register(storage: Storage) -> Storage:
    """Make a storage known, so that modules which keep weights in its way can be adapted; returns it."""
    STORAGES.insert(0, storage)
    return storage


def weights_of(module: nn.Module) -> Iterator[tuple[str, Reading, Storage]]:
    """The weights that a module keeps: the name of the parameter, how it is read, how it is stored."""
    for storage in STORAGES:
        found = list(storage.weights(module))
        if found:
            yield from ((parameter, reading, storage) for parameter, reading in found)
            return


__all__ = ["DENSE", "FLOAT8", "STORAGES", "Dense", "Float8", "Float8Linear", "Storage", "register", "weights_of"]
