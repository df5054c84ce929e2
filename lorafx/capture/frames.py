"""Frames: whose code runs now, and which line of the model's own, told from Python's stack.

A model's questions to torch come through the same functions as torch's questions to itself. Those who watch what a
model does while it is captured look at who asks; errors end with the line of the model that is to blame.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from ..torch_private.tensors import MODULE_CALL

_LORAFX = __name__.partition(".")[0] + "."
# Code of these is nobody's own: torch, lorafx, contexts, what has no file, and the scripts that start programs.
_NO_MODELS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), contextlib.__file__, "<")
# The modules by which tensors and modes hand a call on, and those of Python and torch that ask for somebody else.
_TORCH_HANDS_ON = ("torch._tensor", "torch.overrides", "torch.utils._contextlib", _LORAFX)
_LIBRARIES_HAND_ON = ("os", "collections.abc", "torch.overrides")


def running_line(frame: FrameType | None = None) -> str:
    """The line of the model's own code that runs now, or in `frame`, as the end of a message; empty if none does."""
    return _line(traceback.extract_stack(frame or inspect.currentframe()))


def line_of(error: BaseException) -> str:
    """The line of the model that raised an error, as the end of a message; empty if torch or lorafx called no model."""
    return _line(traceback.extract_tb(error.__traceback__))


def running_module() -> tuple[nn.Module | None, tuple[Any, ...], dict[str, Any]]:
    """The innermost module that is called now, and its arguments as they were given; None if none is."""
    frame: Any = inspect.currentframe()
    while frame is not None and frame.f_code is not MODULE_CALL:
        frame = frame.f_back
    if frame is None:
        return None, (), {}
    found = frame.f_locals
    return found["self"], found["args"], found["kwargs"]


def _line(frames: traceback.StackSummary) -> str:
    outside = (frame for frame in frames if not frame.filename.startswith((*_NO_MODELS, sys.prefix + "/bin")))
    inside_model = [frame for frame in outside if frame.name != "<module>"]
    if not inside_model:
        return ""
    frame = inside_model[-1]
    return f" [{frame.filename}:{frame.lineno}: {frame.line}]"


def is_asked_by_torch() -> bool:
    """Whether torch's own code called the torch function that a mode is given now, and not the model's."""
    frame: Any = inspect.currentframe()
    while _home(frame).startswith(_TORCH_HANDS_ON):
        frame = frame.f_back
    return is_torchs_own(_home(frame))


def is_asked_by_a_library() -> bool:
    """Whether torch itself asks the process something now, or a part of Python's library, and not the model."""
    frame: Any = inspect.currentframe()
    while frame is not None and ((home := _home(frame)) in _LIBRARIES_HAND_ON or home.startswith(_LORAFX)):
        frame = frame.f_back
    package = _home(frame).partition(".")[0] if frame is not None else ""
    return package == "torch" or (package != "__main__" and package in sys.stdlib_module_names)


def is_torchs_own(module: str) -> bool:
    """Whether a Python module of this name is of torch itself."""
    return module == "torch" or module.startswith("torch.")


def _home(frame: FrameType) -> str:
    """The name of the Python module whose code runs in a frame."""
    return str(frame.f_globals.get("__name__", ""))
