"""Functions put in the place of others while a model is captured: Python's `range`, and a cache layer's methods.

Neither torch nor transformers promises that models get at these functions by these names.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers.cache_utils import DynamicSlidingWindowLayer

# The method as transformers has it, for layers that keep more than their window.
plain_update = DynamicSlidingWindowLayer.update


@contextlib.contextmanager
def range_replaced(model: nn.Module, function: Callable[..., range]) -> Iterator[None]:
    """Let the files that define a model's modules find `function` when they say `range`; torch's own files do not.

    A name of a file goes before a builtin. Were it not so, loops over a size would be unrolled, for this size alone.
    """
    names = {type(module).__module__ for module in model.modules()}
    files = [vars(sys.modules[name]) for name in names if name in sys.modules and not name.startswith("torch.")]
    without_own = [file for file in files if "range" not in file]
    for file in without_own:
        file["range"] = function
    try:
        yield
    finally:
        for file in without_own:
            del file["range"]


@contextlib.contextmanager
def sliding_windows_replaced(update: Callable[..., Any], get_mask_sizes: Callable[..., Any]) -> Iterator[None]:
    """Let transformers' cache layers with a sliding window run these methods. They use its attributes.

    Were it not so, a cache that fills up would need a graph before its window is full, one just then, one after it.
    """
    own = {name: vars(DynamicSlidingWindowLayer)[name] for name in ("update", "get_mask_sizes")}
    DynamicSlidingWindowLayer.update, DynamicSlidingWindowLayer.get_mask_sizes = update, get_mask_sizes  # type: ignore
    try:
        yield
    finally:
        for name, method in own.items():
            setattr(DynamicSlidingWindowLayer, name, method)
