"""Notes: what data said of a weight, for start values that come out of data. They count until the weight is changed."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..torch_private.tensors import version_of

_notes: Any = WeakTensorKeyDictionary()  # of weights, to what it is for, what was found, and the weight's version then


def note(weight: Tensor, purpose: str, found: Tensor) -> None:
    """Note what was found out about a weight as it is now. One note is kept of a weight, and while the weight lives."""
    _notes[weight] = purpose, found, version_of(weight)


def noted(weight: Tensor, purpose: str) -> Tensor | None:
    """What was noted for this purpose, of a weight that is as it was then."""
    known = _notes.get(weight)
    return known[1] if known and known[0] == purpose and known[2] == version_of(weight) else None


def forget(weight: Tensor) -> None:
    """Forget what was noted of a weight: a matrix of its size, or more."""
    _notes.pop(weight, None)


def pass_on(weight: Tensor, copy: Tensor) -> None:
    """Have what is noted of a weight be noted of a copy of it, too."""
    known = _notes.get(weight)
    if known and known[2] == version_of(weight):
        note(copy, *known[:2])
