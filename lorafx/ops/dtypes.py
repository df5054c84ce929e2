"""Dtypes: half precision, and the float32 that holds every number of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

HALF = torch.bfloat16, torch.float16


def is_half(tensor: Tensor) -> bool:
    """Whether a tensor's dtype is bfloat16 or float16."""
    return tensor.dtype in HALF


def at_least_float32(value: Any) -> Any:
    """A tensor of half precision cast to float32; anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value
