"""Storages: ways of keeping a weight in memory, one file each.

A storage finds the weights that a module keeps in its way, says their shape and dtype when dense, and goes from the
stored tensors to a dense weight and back. `register` adds a storage of your own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from ...errors import AdapterError
from ...tree.attached import named_own_modules
from ...tree.lookup import module_at
from ...tree.wrappers import innermost
from ..readings import Reading
from .bitsandbytes_4bit import Bitsandbytes4bit
from .bitsandbytes_8bit import Bitsandbytes8bit
from .dense import DENSE, Dense
from .float8 import FLOAT8, Float8, Float8Linear
from .opaque import Opaque
from .own_layer import OwnLayer
from .storage import Storage
from .torchao import TorchAO

if TYPE_CHECKING:
    from ..site import Site

# The first that finds a weight in a module says how it is stored; those that `register` adds are asked first.
STORAGES: list[Storage] = [FLOAT8, Bitsandbytes4bit(), Bitsandbytes8bit(), TorchAO(), DENSE, Opaque()]


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


def own_layers(root: nn.Module) -> Iterator[nn.Module]:
    """The modules below that are sure to keep a weight so that only their own forward reads it."""
    for module in root.modules():
        if any(isinstance(storage, OwnLayer) and storage.is_certain(module) for *_, storage in weights_of(module)):
            yield module


def prepare_base(base: nn.Module) -> None:
    """Have the base's own quantised layers leave the weights that they share as they are."""
    for module in base.modules():
        for _, _, storage in weights_of(module):
            if isinstance(storage, OwnLayer):
                storage.prepare(module)


def keep_own_layers(root: nn.Module, adapted: Iterable[str] = ()) -> None:
    """Have modules of a tree run their own forward: those whose storages are sure of it, and those at paths `adapted`.

    What is true of an adapted module is true of all of its class, wherever an adapter is or is not.
    Raises `SelectionError` as `Storage.of` does.
    """
    chosen = set(adapted)
    classes = {type(module) for path, module in named_own_modules(root) if path in chosen}
    for path, module in named_own_modules(root):
        for _, _, storage in weights_of(module):
            if isinstance(storage, OwnLayer) and (type(module) in classes or storage.is_certain(module)):
                storage.of(module, path).install(module)  # type: ignore[attr-defined]


def require_not_packed_since(root: nn.Module, sites: Iterable[Site]) -> None:
    """Raise `AdapterError` if weights that were dense are a library's packed tensors by now."""
    packed: dict[Any, bool] = {}  # by what is alike in repeated layers, of which one is looked at
    names = []
    for site in sites:
        owner = innermost(module_at(root, site.module))
        weight = owner._parameters.get(site.parameter)
        kind = type(owner), type(weight), site.parameter, weight is not None and (weight.dtype, weight.shape)
        if site.storage == DENSE and kind not in packed:
            found = [storage for _, _, storage in weights_of(owner) if isinstance(storage, OwnLayer)]
            packed[kind] = any(storage.is_certain(owner) for storage in found)
        if site.storage == DENSE and packed[kind]:
            names.append(site.name)
    if names:
        raise AdapterError(
            f"{', '.join(names)}: quantised since an adapter was put there. Quantise the base, and adapt it then; "
            "an adapter's file fits both"
        )


__all__ = [
    "DENSE",
    "FLOAT8",
    "STORAGES",
    "Dense",
    "Float8",
    "Float8Linear",
    "OwnLayer",
    "Storage",
    "keep_own_layers",
    "own_layers",
    "prepare_base",
    "register",
    "require_not_packed_since",
    "weights_of",
]
