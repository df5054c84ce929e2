"""What a call must not do to be captured: anything besides tensor operators, since a graph would not do it again."""

from __future__ import annotations

import contextlib
import io
import pickle
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy
from torch import nn

from ..errors import CaptureError
from ..graph.description import held_key
from ..tree.holdings import attributes_noted, snapshot
from ..tree.settings import settings_of
from .frames import running_line


class _Printed(io.StringIO):
    """Stands in for stdout, and remembers the line of the model that wrote first; other threads write to the screen."""

    line = ""

    def __init__(self) -> None:
        super().__init__()
        self.screen, self.thread = sys.stdout, threading.get_ident()

    def write(self, text: str) -> int:
        if threading.get_ident() != self.thread:
            return self.screen.write(text)
        self.line = self.line or running_line()
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


class ForGood(CaptureError):
    """A call does more than to compute, perhaps once and for good: it may not do so when it is captured once more."""

    def put_back(self) -> None:
        """Undo what the call has changed, if anything."""


class Changed(CaptureError):
    """A call changes what the model's modules hold, under these dotted names. Everything is as it was."""

    def __init__(self, names: Sequence[str]):
        super().__init__(f"it changes {names[0]} of the model, which a graph would not do again")
        self.names = names


class Noted(Changed, ForGood):
    """A call changes only objects that a mirror shares with the model, such as its config. They are still changed."""

    def __init__(self, names: Sequence[str], put_back: Callable[[], None]):
        super().__init__(names)
        self.put_back = put_back  # type: ignore[method-assign]


@contextlib.contextmanager
def unchanging(model: nn.Module) -> Iterator[None]:
    """Raise `Changed` or `Noted` if what runs inside sets, changes or fills what a module has, or what that holds."""
    kept: list[Any] = []
    before, put_back = _attributes(model, kept), _snapshot(model)
    try:
        yield
    except BaseException:
        put_back()
        raise
    after = _attributes(model, kept)
    different = [
        name for name in before | after if name not in before or name not in after or before[name] != after[name]
    ]
    if different:
        if all(name in _shared(model) for name in different):
            raise Noted(different, put_back)
        put_back()
        raise Changed(different)


def _shared(model: nn.Module) -> set[str]:
    """The settings of objects that are neither modules nor classes."""
    places = settings_of(model.named_modules())
    objects = [(path, names) for path, holder, names in places if not isinstance(holder, (nn.Module, type))]
    return {f"{path}.{name}".lstrip(".") for path, names in objects for name in names}


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


def _attributes(model: nn.Module, kept: list[Any]) -> dict[str, Any]:
    """The settings of a model: a key by the dotted name of each; a tensor is another one if it was put there since."""
    places = list(settings_of(model.named_modules()))
    apart = {id(holder) for _, holder, _ in places}
    return {
        f"{path}.{name}".lstrip("."): held_key(vars(holder)[name], kept, apart)
        for path, holder, names in places
        for name in names
    }


def _snapshot(model: nn.Module) -> Callable[[], None]:
    """Take note of what a model's settings hold, for a mirror shares objects with the model that it is a mirror of."""
    places = list(settings_of(model.named_modules()))
    values = [vars(holder)[name] for _, holder, names in places for name in names]
    put_back = snapshot([*(holder for _, holder, _ in places), *values])
    put_back_classes = attributes_noted(holder for _, holder, _ in places if isinstance(holder, type))

    def put_all_back() -> None:
        put_back_classes()
        put_back()

    return put_all_back
