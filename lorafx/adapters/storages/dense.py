"""Dense: the weight is a parameter, number by number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from ..readings import READINGS, Reading
from .storage import Storage


class Dense(Storage):
    """The parameter itself, in modules of the classes that readings name."""

    name = "dense"

    def weights(self, module: nn.Module) -> Iterator[tuple[str, Reading]]:
        for reading in READINGS:
            own = module._parameters.get(reading.weight)
            if isinstance(own, nn.Parameter) and isinstance(module, reading.modules):
                yield reading.weight, reading
                return

    def dense(self, stored: Mapping[str, Tensor]) -> Tensor:
        return stored["weight"]

    def packed(self, dense: Tensor, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"weight": dense.to(stored["weight"].dtype)}


DENSE = Dense()
