"""Dense: the weight is a parameter, number by number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from ..readings import READINGS, Reading
from .opaque import is_by_name, is_foreign
from .storage import Storage


class Dense(Storage):
    """The parameter itself, in modules of the classes that readings name."""

    name = "dense"

    def weights(self, module: nn.Module) -> Iterator[tuple[str, Reading]]:
        found: dict[str, Reading] = {}
        for reading in READINGS:
            own = module._parameters.get(reading.weight)
            if (
                isinstance(own, nn.Parameter)
                and isinstance(module, reading.modules)
                and not _is_packed(own, module, reading)
            ):
                found.setdefault(reading.weight, reading)
        yield from found.items()

    def dense(self, stored: Mapping[str, Tensor]) -> Tensor:
        return stored["weight"]

    def packed(self, dense: Tensor, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"weight": dense.to(stored["weight"].dtype)}


def _is_packed(weight: nn.Parameter, module: nn.Module, reading: Reading) -> bool:
    """Whether a weight is numbers that the module reads in a way of its own, as quantised layers do.

    These are integers and floats of 8 bits, or tensors of a library's own class.
    """
    own = type(module).forward not in [cls.forward for cls in reading.modules]
    wide = weight.is_complex() or (weight.is_floating_point() and weight.dtype.itemsize > 1)
    return (own and not wide) or is_foreign(weight) or is_by_name(module)


DENSE = Dense()
