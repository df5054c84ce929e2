"""What a reading is: the operators by which a graph reads a weight, and the same operators with other weights.

An update of low rank goes through two small weights instead of a large one: a *narrow* operator goes from the inputs to
r features, a *wide* one from there to the outputs. Which operators these are depends on how the weight is read, so the
reading says it, once for all kinds.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..low_rank import LowRank

Shape = tuple[int, ...]
Arguments = Callable[..., tuple[Any, ...] | None]


def matrix_features(shape: Shape, transposed: bool) -> tuple[int, int]:
    """(in_features, out_features) of a matrix, stored (out, in), or (in, out) if it is transposed."""
    rows, columns = shape
    return (rows, columns) if transposed else (columns, rows)


def _last(v: Any) -> Any:
    """Features are the last dimension."""
    return v


@dataclass(frozen=True)
class Operator:
    """One operator that reads a weight.

    `pattern` is the operator as a plain function over `torch.ops.aten`. Its first argument is `x`, one is `weight`, the
    others are whatever else the operator takes. `narrow(x, a)` and `wide(h, b)` are the operators for the factors A and
    B of an update, with arguments in this order. They may have further ones: `wide` one named `update_bias`, which is
    an adapter's bias or None, and both any of the pattern's (`stride`, `start`), with the same values. `transposed`
    says that the weight is stored (in, out), `lookup` that x holds row numbers instead of features.

    `full(x, w)` is the operator with another weight of the same shape, (out, in) for any matrix, and no bias, if that
    is not what `narrow` does; it may have further arguments as `narrow` has.

    `inputs(v)` and `outputs(v)` give a tensor of one number for each input or output, (in,) or (out,), the shape in
    which x or the result can be multiplied by it; the latter may have further arguments as `wide` has.

    `calls` are torch functions that are this operator, each with a function of the same arguments that gives the
    pattern's, in order, or None where with these arguments it is something else. Where such a function is called, the
    equation is run right there; where another one reads a weight, it has to be captured first. A module class's
    `forward` that does nothing else may be among them, with the module as its first argument: it is not even run.

    `is_of_rows` is False where x has tokens in an order that says nothing of the rows of the batch.
    """

    pattern: Callable[..., Any]
    narrow: Callable[..., Any]
    wide: Callable[..., Any]
    transposed: bool = False
    lookup: bool = False
    full: Callable[..., Any] | None = None
    inputs: Callable[..., Any] = _last
    outputs: Callable[..., Any] = _last
    calls: tuple[tuple[Callable[..., Any], Arguments], ...] = ()
    is_of_rows: bool = True

    def given(self, function: Callable[..., Any], bound: dict[str, Any], own: int = 2) -> dict[str, Any]:
        """The values in `bound` of the arguments that one of these functions has after its `own`."""
        return {name: bound[name] for name in names_of(function)[own:] if name in bound}


@functools.cache  # of functions, whose arguments stay what they are
def names_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a function's arguments."""
    return tuple(inspect.signature(function).parameters)


@dataclass(frozen=True)
class Reading:
    """How modules of certain classes read their weight.

    `weight` and `bias` are the modules' names for the two parameters. The first of `operators` is that of the modules'
    own forward. `matrix` says that operators of other `matrix` readings may read such a weight too, as a linear head
    reads an embedding that it is tied to. `along` names children that are adapted whenever their module is.
    `value` is the weight itself as an operator: where a config names the parameter, any function may read it so.
    """

    name: str
    modules: tuple[type[nn.Module], ...]
    operators: tuple[Operator, ...]
    weight: str = "weight"
    bias: str = "bias"
    matrix: bool = True
    along: tuple[str, ...] = ()
    value: Operator | None = None

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored (in, out)."""
        return self.operators[0].transposed

    @property
    def lookup(self) -> bool:
        """Whether the modules are given row numbers instead of features."""
        return self.operators[0].lookup

    def features(self, shape: Shape, groups: int) -> tuple[int, int]:
        """(in_features, out_features) of a weight of this shape; for an embedding, (rows, features)."""
        return matrix_features(shape, self.transposed)

    def factors(self, shape: Shape, groups: int, rank: int) -> tuple[Shape, Shape]:
        """The shapes of A, the narrow weight, and B, the wide one, for a weight of this shape."""
        inputs, outputs = self.features(shape, groups)
        return (rank, inputs), (outputs, rank)

    def product(self, a: Tensor, b: Tensor, shape: Shape) -> LowRank | Tensor:
        """B A as a change of a weight of this shape, transposed if that is stored (in, out)."""
        return LowRank(a.t(), b.t(), shape) if self.transposed else LowRank(b, a, shape)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or what is unpickled, is the reading itself: its operators are functions, which cannot be pickled."""
        return reading_called, (self.name,)

    def __repr__(self) -> str:
        return self.name


# The first that fits a module counts. `register` adds at the front, so that a subclass can have a reading of its own.
READINGS: list[Reading] = []


def reading_called(name: str) -> Reading:
    """The reading of a name, among those that are known."""
    return next(reading for reading in READINGS if reading.name == name)
