"""library: how Python functions become operators, `torch.ops.lorafx.…`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("lorafx", "FRAGMENT")  # operators live as long as it does


def composite(schema: str, function: Callable[..., Any]) -> None:
    """Define an operator that is made of others: those are what compilers, fake tensors and transforms see of it."""
    LIBRARY.define(schema)
    for key in ("CompositeImplicitAutograd", "FuncTorchBatchedDecomposition"):
        LIBRARY.impl(schema.partition("(")[0], function, key)
