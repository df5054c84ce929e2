"""What a storage is: a way of keeping a weight in memory, and how to get from there to a dense tensor and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...tree.lookup import tensor_at
from ..readings import Operator, Reading
from ..readings.reading import names_of


class Storage:
    """A way of keeping weights. A subclass says which modules keep theirs so, and how.

    `whole` says that a module has one such weight, which its site is not named after, `readable` that graphs and code
    outside of the module can make it dense. `lossy` says that `dense(packed(W))` may differ from W by more than one
    rounding. `operators` are operators that read the stored weight itself; besides them a graph may read it by any
    operator of its reading, on the result of `expression`.
    """

    name = ""
    lossy = False
    whole = False
    readable = True
    operators: tuple[Operator, ...] = ()

    def weights(self, module: nn.Module) -> Iterator[tuple[str, Reading]]:
        """The names of a module's parameters that are stored so, each with its reading; none for any other module."""
        raise NotImplementedError

    def of(self, module: nn.Module, path: str = "") -> Storage:
        """This storage with what it has to know of a module at `path` that keeps its weights so, such as block sizes.

        Raises `SelectionError` for one whose weights cannot be used as they are.
        """
        return self

    def stored(self, module: nn.Module, parameter: str) -> dict[str, Tensor]:
        """All tensors of the module that make up the weight, by the names of `expression`'s arguments."""
        return {"weight": tensor_at(module, parameter)}

    def shape(self, module: nn.Module, parameter: str) -> tuple[int, ...]:
        """The shape of the dense weight."""
        return tuple(tensor_at(module, parameter).shape)

    def dtype(self, module: nn.Module, parameter: str) -> torch.dtype:
        """The dtype of the dense weight, from which an adapter's parameters take theirs."""
        return tensor_at(module, parameter).dtype

    @staticmethod
    def expression(weight: Any) -> Any:
        """The dense weight as graphs compute it: a function over `torch.ops.aten`; `weight` is the parameter itself."""
        return weight

    def read(self, shape: tuple[int, ...], given: Mapping[str, Any]) -> Any:
        """The dense weight, of this shape, where an operator reads it that is `given` these arguments, by name."""
        return self.expression(**{name: given[name] for name in names_of(self.expression)})

    def dense(self, stored: Mapping[str, Tensor]) -> Tensor:
        """The dense weight from what `stored` gives: in the shape of `shape`, and the dtype of `dtype` or a wider."""
        raise NotImplementedError

    def packed(self, dense: Tensor, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that keep another dense weight (float64), with shapes and dtypes as in `stored`.

        Those that stay the same may be left out. Raises `MergeError` if there are no such tensors.
        """
        raise NotImplementedError

    def written(self, module: nn.Module) -> None:
        """What has to be done once the tensors that make up the weight have been written to."""

    def __eq__(self, other: object) -> bool:
        """Storages of one class and the same options are the same: copies of models have copies of them."""
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return self.name
