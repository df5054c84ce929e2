"""What a reading is: the operators by which a graph reads a weight, and the same operators with other weights.

An update of low rank goes through two small weights instead of a large one: a *narrow* operator from the inputs to r
features and a *wide* one from there to the outputs. Which operators these are depends on how the weight is read, so the
reading says it, once for all adapter families.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Shape = tuple[int, ...]


def matrix_features(shape: Shape, transposed: bool) -> tuple[int, int]:
    """(in_features, out_features) of a matrix, stored (out, in), or (in, out) if it is transposed."""
    rows, columns = shape
    return (rows, columns) if transposed else (columns, rows)


@dataclass(frozen=True)
class Operator:
    """One operator that reads a weight.

    `pattern` is the operator as a plain torch function over `torch.ops.aten`. Its first argument is `x`, one is
    `weight`, the others are whatever else the operator takes. `narrow(x, a)` and `wide(h, b, bias)` are the operators
    that take the place of it for the factors A and B of an update. They may name arguments of the pattern (`stride`,
    `start`) and are given what those stand for. `transposed` says that the weight is stored (in, out), `lookup`
    that x holds row numbers instead of features.
    """

    pattern: Callable[..., Any]
    narrow: Callable[..., Any]
    wide: Callable[..., Any]
    transposed: bool = False
    lookup: bool = False

    def given(self, function: Callable[..., Any], bound: dict[str, Any]) -> dict[str, Any]:
        """Those of the pattern's arguments that `narrow` or `wide` names after its own two."""
        return {name: bound[name] for name in names_of(function)[2:] if name in bound}


def names_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a function's arguments."""
    return tuple(inspect.signature(function).parameters)


@dataclass(frozen=True)
class Reading:
    """How modules of some classes have their weight read.

    `weight` and `bias` are what the modules call it and its bias. The first of `operators` is that of the module's own
    forward. `matrix` says that every other operator on matrices can read such a weight too, as a head that is tied to
    an embedding does. `along` names children that are adapted whenever their module is.
    """

    name: str
    modules: tuple[type[nn.Module], ...]
    operators: tuple[Operator, ...]
    weight: str = "weight"
    bias: str = "bias"
    matrix: bool = True
    along: tuple[str, ...] = ()

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored (in, out)."""
        return self.operators[0].transposed

    @property
    def lookup(self) -> bool:
        """Whether the modules are given row numbers instead of features."""
        return self.operators[0].lookup

    def features(self, shape: Shape, groups: int) -> tuple[int, int]:
        """(in_features, out_features) of a weight of this shape; an embedding reads one of `in` rows."""
        return matrix_features(shape, self.transposed)

    def factors(self, shape: Shape, groups: int, rank: int) -> tuple[Shape, Shape]:
        """The shapes of A, the narrow weight, and B, the wide one."""
        inputs, outputs = self.features(shape, groups)
        return (rank, inputs), (outputs, rank)

    def product(self, a: Tensor, b: Tensor, shape: Shape) -> Tensor:
        """B A as a change of a weight of this shape."""
        change = b @ a
        return change.t() if self.transposed else change

    def __repr__(self) -> str:
        return self.name
