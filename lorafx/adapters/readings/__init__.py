"""Readings: the operators by which graphs read weights, one file a family.

A reading names the module classes that own such a weight, the operators as patterns over ATen, and for each operator
two more of its family, with a narrow and a wide weight. Kinds are written in terms of these two, so that they work on
every weight that has a reading. `register` adds a reading of your own.
"""

from __future__ import annotations

from typing import Any

from .convolution import CONVOLUTIONS
from .embedding import EMBEDDING
from .experts import EXPERTS, TRANSPOSED_EXPERTS
from .linear import CONV1D, LINEAR
from .multihead import IN_PROJ
from .reading import READINGS, Operator, Reading

READINGS += [LINEAR, CONV1D, EMBEDDING, *CONVOLUTIONS, IN_PROJ, EXPERTS, TRANSPOSED_EXPERTS]


def register(reading: Reading) -> Reading:
    """Make a reading known, so that modules of its classes can be adapted; returns it."""
    READINGS.insert(0, reading)
    return reading


def operators_for(reading: Reading, dimensions: int) -> tuple[Operator, ...]:
    """The operators that may read a weight: its own first, then, for a matrix, those of any other matrix."""
    others = [other for other in READINGS if other.matrix] if reading.matrix and dimensions == 2 else []
    found: dict[Any, Operator] = {}
    for operator in (operator for each in (reading, *others) for operator in each.operators):
        found.setdefault(operator.pattern, operator)
    return tuple(found.values())


__all__ = [
    "CONV1D",
    "CONVOLUTIONS",
    "EMBEDDING",
    "EXPERTS",
    "IN_PROJ",
    "LINEAR",
    "READINGS",
    "TRANSPOSED_EXPERTS",
    "Operator",
    "Reading",
    "operators_for",
    "register",
]
