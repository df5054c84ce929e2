"""What a model takes from outside while it runs, or does there: clocks, files, logs, random numbers not of torch's own.

A graph would have what the model took as a constant, and would do nothing of it again. So such a call has no graph.
Python's profiling hook tells which builtin functions the model's own code calls, by whatever name. Torch's functions
run without it, as they take a hundred times as many.
"""

from __future__ import annotations

import datetime
import functools
import io
import logging
import os
import random
import sys
import time
from collections.abc import Callable
from types import BuiltinFunctionType, FrameType, ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..errors import CaptureError
from .frames import running_line
from .purity import ForGood

_CLOCK, _FILES = "reads a clock", "reads or writes files"
_DRAWS = "draws random numbers that are not of torch's own generator"
_SYSTEM = os.stat.__module__  # posix or nt
# What builtin functions do, by the module or class that they belong to, and by their own names.
_FUNCTIONS: dict[tuple[str | type, str], str] = {
    **{("time", name): _CLOCK for name, value in vars(time).items() if isinstance(value, BuiltinFunctionType)},
    **{(datetime.datetime, name): _CLOCK for name in ("now", "utcnow", "today")},
    (datetime.date, "today"): _CLOCK,
    **{(_SYSTEM, name): _FILES for name in ("open", "stat", "lstat", "listdir", "scandir", "access")},
    **{(_SYSTEM, name): _FILES for name in ("mkdir", "rename", "replace", "unlink", "remove")},
    (open.__module__, "open"): _FILES,
    (_SYSTEM, "urandom"): _DRAWS,
    ("builtins", "print"): "prints",
    ("builtins", "input"): "asks its user",
    ("_thread", "start_new_thread"): "starts a thread",
    ("_posixsubprocess", "fork_exec"): "starts a process",
}
# What methods of objects do, by the objects' class.
_METHODS: dict[type, tuple[str, tuple[str, ...]]] = {
    random.Random: (_DRAWS, ("random", "getrandbits")),
    torch.Generator: ("seeds random numbers, or asks how", ("manual_seed", "seed", "initial_seed", "set_state")),
    io.IOBase: (_FILES, ("read", "readline", "readlines", "readinto", "write", "writelines")),
}
_NAMES = {name for _, name in _FUNCTIONS} | {name for _, names in _METHODS.values() for name in names}
_OTHERS = ("torch", "sympy", "lorafx")  # while a model is captured, these run beside its own code
_LOGS = logging.Logger.makeRecord.__code__


def unwatched(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate what stands between a model and torch, so that nobody looks at what it calls."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        look = sys.getprofile()
        if not isinstance(getattr(look, "__self__", None), OutsideUse):
            return function(*args, **kwargs)
        sys.setprofile(None)
        try:
            return function(*args, **kwargs)
        finally:
            sys.setprofile(look)

    return run


class OutsideUse(TorchFunctionMode):
    """Watches what this thread's model does besides computing; the last mode to be entered.

    Raises `CaptureError` where it hands torch a generator, and at the end `ForGood` for the first of all else that it
    did: a warning that comes once, or a file that is read once, may not come again. A profiler that is running already
    is left alone, and nothing is seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = ""

    def __enter__(self) -> OutsideUse:
        super().__enter__()
        if sys.getprofile() is None:
            sys.setprofile(self._look)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if sys.getprofile() == self._look:
            sys.setprofile(None)
        super().__exit__(kind, error, trace)
        if self.seen and error is None:
            raise ForGood(f"it {self.seen}")

    @unwatched
    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values())):
            raise CaptureError(f"it names a generator to draw from, which no graph does{running_line()}")
        return func(*args, **kwargs)

    def _look(self, frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call":  # this is asked a million times
            if called.__name__ not in _NAMES:
                return
            does = _does(called)
        elif event == "call" and frame.f_code is _LOGS:
            does = "logs a message"
        else:
            return
        if does and not self.seen and (caller := _caller(frame, through_torch=_is_source(called))):
            self.seen = f"{does}, which a graph would not do again{running_line(caller)}"


def _does(called: Any) -> str:
    """What a builtin function does outside, if anything."""
    owner = called.__self__
    if isinstance(owner, (io.StringIO, io.BytesIO)) and owner is not sys.stderr:
        return ""  # nobody else sees it
    if isinstance(owner, (ModuleType, type)):
        home = owner.__name__ if isinstance(owner, ModuleType) else owner
        return _FUNCTIONS.get((home, called.__name__), "")
    known = (does for kind, (does, names) in _METHODS.items() if isinstance(owner, kind) and called.__name__ in names)
    return next(known, "")


def _is_source(called: Any) -> bool:
    """Whether a method of a source of torch's random numbers is called: `torch.manual_seed` calls it for others."""
    return isinstance(getattr(called, "__self__", None), torch.Generator)


def _caller(frame: FrameType | None, through_torch: bool) -> FrameType | None:
    """The model's code that calls, by way of Python's library or not; None if it is somebody else, or an import."""
    handing_on = sys.stdlib_module_names | ({"torch"} if through_torch else set())
    while frame is not None:
        home = str(frame.f_globals.get("__name__", ""))
        package = home.partition(".")[0]
        if home.startswith("importlib") or frame.f_code.co_filename.startswith("<frozen importlib"):
            return None
        if home == "__main__" or package not in handing_on:
            return None if package in _OTHERS else frame
        frame = frame.f_back
    return None
