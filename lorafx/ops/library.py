"""The library: how Python functions become operators, `torch.ops.lorafx.…`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("lorafx", "FRAGMENT")  # kept here, for operators are gone when it is


def composite(schema: str, function: Callable[..., Any]) -> None:
    """Define an operator by a function that calls others: compilers, fake tensors and transforms see those others."""
    LIBRARY.define(schema)
    for key in ("CompositeImplicitAutograd", "FuncTorchBatchedDecomposition"):
        LIBRARY.impl(schema.partition("(")[0], function, key)
