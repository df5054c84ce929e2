"""What a storage is: a way of keeping a weight in memory, and how to get from there to a dense tensor and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..readings import Operator, Reading


class Storage:
    """A way of keeping weights. A subclass says which modules keep theirs so, and how.

    `lossy` says that a dense weight that is put back (`packed`) is not the dense weight that is found afterwards.
    `operators` are operators of a graph that read the stored weight itself; besides them a graph may read it by any
    operator of its reading, on what `expression` makes of the stored tensors.
    """

    name = ""
    lossy = False
    operators: tuple[Operator, ...] = ()

    def weights(self, module: nn.Module) -> Iterator[tuple[str, Reading]]:
        """The parameters of a module that hold a weight stored so, by name, and how each is read."""
        raise NotImplementedError

    def stored(self, module: nn.Module, parameter: str) -> dict[str, Tensor]:
        """All tensors of the module that make the weight, by the names of `expression`'s arguments."""
        return {"weight": module.get_parameter(parameter)}

    def shape(self, module: nn.Module, parameter: str) -> tuple[int, ...]:
        """The shape of the dense weight."""
        return tuple(module.get_parameter(parameter).shape)

    def dtype(self, module: nn.Module, parameter: str) -> torch.dtype:
        """The dtype of the dense weight, which an adapter's parameters take."""
        return module.get_parameter(parameter).dtype

    @staticmethod
    def expression(weight: Any) -> Any:
        """The dense weight as a graph computes it, a plain function over `torch.ops.aten`; its other names are free."""
        return weight

    def dense(self, stored: Mapping[str, Tensor]) -> Tensor:
        """The dense weight, from the tensors that `stored` gives."""
        raise NotImplementedError

    def packed(self, dense: Tensor, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that keep another dense weight, of the shapes and dtypes of `stored`.

        Raises `MergeError` where there are none.
        """
        raise NotImplementedError

    def __repr__(self) -> str:
        return self.name
