"""Descriptions: hashable stand-ins for values, equal where a captured graph could not tell the values apart."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

# What every module has, and torch or lorafx look after: parameters, buffers, modules, hooks.
MODULES_OWN = frozenset(vars(nn.Module())) - {"training"} | {"_lorafx", "_lorafx_attached"}
PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
DEPTH, LARGE = 4, 4096  # of containers within containers; of one whose items are not looked at


def content(value: Any, depth: int = DEPTH) -> Hashable:
    """Something that is equal for equal plain values and containers of them, and for one and the same other object.

    A tensor counts by what a graph is specialised on; its values are read when the graph runs.
    """
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, Tensor):
        return Tensor, value.dtype, value.device, value.shape
    if isinstance(value, (list, tuple, dict, set, frozenset)) and len(value) > LARGE:
        return type(value), len(value), id(value)  # a vocabulary, say, and no setting
    if isinstance(value, (list, tuple)) and depth:
        return type(value), *(content(item, depth - 1) for item in value)
    if isinstance(value, dict) and depth:
        return type(value), *((content(key), content(item, depth - 1)) for key, item in value.items())
    if isinstance(value, weakref.ref):  # it owns nothing, as those in which an LSTM remembers its weights
        return (weakref.ref,)
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(content(item, depth - 1) for item in value)
    return type(value), id(value)
