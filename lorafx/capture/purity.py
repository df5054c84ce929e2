"""What a call must not do to be captured: anything besides tensor operators, since a graph would not do it again."""

from __future__ import annotations

import contextlib
import io
import pickle
import random
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from ..errors import CaptureError
from ..graph.description import MODULES_OWN, attribute_key
from ..torch_private.replacing import range_replaced

_TORCH, _LORAFX = str(Path(torch.__file__).parent), str(Path(__file__).parents[1])


class _Printed(io.StringIO):
    """Stands in for stdout, and remembers the line of the model that wrote first; other threads write to the screen."""

    line = ""

    def __init__(self) -> None:
        super().__init__()
        self.screen, self.thread = sys.stdout, threading.get_ident()

    def write(self, text: str) -> int:
        if threading.get_ident() != self.thread:
            return self.screen.write(text)
        self.line = self.line or _place(traceback.extract_stack())
        return super().write(text)


@contextlib.contextmanager
def pure() -> Iterator[None]:
    """Raise `CaptureError` if what runs inside prints, or draws random numbers outside torch.

    Served by a graph, such a call would print once and never again, or mask the same frames in every step. What it
    prints is dropped, and Python's and numpy's random states are put back, so it can be run again without a graph.
    """
    printed = _Printed()
    with _kept_random_states() as drawn, contextlib.redirect_stdout(printed):
        yield
    if drawn:
        raise CaptureError("it draws random numbers from Python or numpy, which a graph would freeze")
    if printed.line:
        raise CaptureError(f"it prints, which a graph would not do again{printed.line}")


class Changed(CaptureError):
    """A call changes the model's own attributes."""


@contextlib.contextmanager
def unchanging(model: nn.Module) -> Iterator[None]:
    """Raise `Changed` if what runs inside sets, changes or fills an attribute of a module."""
    before = _attributes(model)
    yield
    after = _attributes(model)
    different = (
        name for name in before | after if name not in before or name not in after or before[name] != after[name]
    )
    if name := next(different, None):
        raise Changed(f"it changes {name} of the model, which a graph would not do again")


@contextlib.contextmanager
def _kept_random_states() -> Iterator[list[str]]:
    """Put the random states of Python and numpy back. Gives a list, to which something is added if they had changed."""
    drawn: list[str] = []
    python, of_numpy = random.getstate(), numpy.random.get_state()
    before = pickle.dumps((python, of_numpy))
    try:
        yield drawn
    finally:
        if pickle.dumps((random.getstate(), numpy.random.get_state())) != before:
            drawn.append("random")
            random.setstate(python)
            numpy.random.set_state(of_numpy)


def _range(*bounds: Any) -> range:
    """Stands in for `range`, which would make of a symbolic size the number that it is in this call."""
    if any(isinstance(bound, torch.SymInt) and not bound.node.is_constant() for bound in bounds):
        raise CaptureError(
            "it loops over a size: a graph would repeat the loop's operators as often as this call does, and fit no "
            f"other{_place(traceback.extract_stack())}"
        )
    return range(*bounds)


@contextlib.contextmanager
def no_unrolling(model: nn.Module) -> Iterator[None]:
    """Raise `CaptureError` where the model's own code loops over a symbolic size, as a scan in Python does."""
    with range_replaced(model, _range):
        yield


def _attributes(model: nn.Module) -> dict[str, Any]:
    """What modules hold besides parameters, buffers, modules and hooks: a key by the dotted name of each attribute."""
    return {
        f"{path}.{name}".lstrip("."): attribute_key(value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if name not in MODULES_OWN
    }


def innermost_line(error: BaseException) -> str:
    """The line of the model that raised an error, as the end of a message; empty if torch or lorafx called no model."""
    return _place(traceback.extract_tb(error.__traceback__))


def _place(frames: traceback.StackSummary) -> str:
    outside = [frame for frame in frames if not frame.filename.startswith((_TORCH, _LORAFX, "<", sys.prefix + "/bin"))]
    inside_model = [frame for frame in outside if frame.name != "<module>"]
    if not inside_model:
        return ""
    frame = inside_model[-1]
    return f" [{frame.filename}:{frame.lineno}: {frame.line}]"
