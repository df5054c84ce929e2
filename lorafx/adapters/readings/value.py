"""The value: a parameter that a config names, read whole by whatever function a model has for it.

    f(…, W, …)  ->  f(…, W + ΔW, …)

An operator that gives the weight itself stands before the function, and has an equation like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .reading import Operator

aten = torch.ops.aten


def value(x, weight):
    """The weight itself, which stands for x as well."""
    return aten.alias.default(weight)


def called_value(weight):
    return weight, weight


def operator_of_value(narrow: Callable[..., Any], wide: Callable[..., Any], transposed: bool = False) -> Operator:
    """The operator that is the weight itself; `wide(narrow(weight, a), b)` is ΔW, in the shape of the weight."""
    calls = ((value, called_value),)
    return Operator(value, narrow, wide, transposed=transposed, lookup=True, calls=calls, is_of_rows=False)


def narrow_of_matrix(x, a):
    """-> A, (r, in)"""
    return a


def wide_of_matrix(h, b):
    """A, (out, r) -> B A, (out, in)"""
    return aten.mm.default(b, h)


VALUE_OF_MATRIX = operator_of_value(narrow_of_matrix, wide_of_matrix)
