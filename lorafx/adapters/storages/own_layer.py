"""What storages have in common whose modules run their own forward, with the adapter beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...ops import own_forward as _forward  # noqa: F401, defines the operator
from ...ops import own_weight as _weight  # noqa: F401
from ...tree.own_layers import run_by_itself
from ..readings import Operator
from ..readings.embedding import wide as wide_of_rows
from ..readings.linear import narrow, wide
from .storage import Storage

aten = torch.ops.aten
_own_forward, _own_weight = torch.ops.lorafx.own_forward.default, torch.ops.lorafx.own_weight.default


def layer(x, weight, bias, number, features, dtype):
    """A linear layer's own forward: (…, in) -> (…, features)"""
    return _own_forward(x, weight, bias, number, features, dtype)


def rows(x, weight, bias, number, features, dtype):
    """An embedding's own forward: (…,) of row numbers -> (…, features)"""
    return _own_forward(x, weight, bias, number, features, dtype)


def called(x, weight, bias, number, features, dtype):
    """Without the weight, by which the site is known already."""
    return x, None, bias, number, features, dtype


def narrow_of_rows(x, a):
    """(…,) of row numbers, (r, rows) -> (…, r)"""
    return aten.embedding.default(aten.t.default(a), x)


CALLS = ((_own_forward, called),)
LAYER = Operator(layer, narrow, wide, calls=CALLS)
ROWS = Operator(rows, narrow_of_rows, wide_of_rows, transposed=True, lookup=True, calls=CALLS)


class OwnLayer(Storage):
    """Weights that are read by their module's forward alone. A subclass says which modules keep theirs so.

    An adapter acts on what that forward gives, in the dtype that it gives.
    """

    lossy = True
    whole = True
    operators = (LAYER, ROWS)

    def is_certain(self, module: nn.Module) -> bool:
        """Whether the module keeps its weights so for sure: then it runs its own forward even if nothing adapts it."""
        return True

    def install(self, module: nn.Module) -> None:
        """Have a module of a tree run its own forward, by one operator."""
        parameter, reading = next(iter(self.weights(module)))
        _, features = reading.features(self.shape(module, parameter), 1)
        dtype = self.dtype(module, parameter) if reading.lookup else None
        factor = self.factor if self.has_factor(module) else None
        run_by_itself(module, parameter, features, dtype, self.prepare, self.dense_of, factor)

    def read(self, shape: tuple[int, ...], given: Mapping[str, Any]) -> Any:
        return _own_weight(given["x"], given["number"], list(shape))

    def dense_of(self, module: nn.Module, parameter: str) -> Tensor:
        """The dense weight of a module that keeps it so."""
        storage = self.of(module)
        return storage.dense(storage.stored(module, parameter))

    def has_factor(self, module: nn.Module) -> bool:
        """Whether a layer's gradient by x is dy W, and what it gives a new tensor, which others may write to."""
        return False

    def factor(self, module: nn.Module, dtype: torch.dtype) -> Tensor:
        """That W (out, in), in the dtype in which the layer multiplies dy by it where x is of `dtype`."""
        raise NotImplementedError

    def prepare(self, module: nn.Module) -> None:
        """What has to be so before the module's own forward runs."""


def is_of(library: str, name: str, module: nn.Module) -> bool:
    """Whether a module is of a class of this name, or of one below it, that a library defines: nothing is imported."""
    return any(cls.__name__ == name and cls.__module__.startswith(library) for cls in type(module).__mro__)
