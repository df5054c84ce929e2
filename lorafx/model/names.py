"""Names: an adapted model has lorafx's, as far as its base does not use the same ones for something of its own.

A base may have a name in its class, among its modules, parameters, buffers or other attributes, or by a `__getattr__`
of its own, from the start or later. So lorafx's names are what is found last. While the model's own Python runs, and
while it registers something, they are not found at all: it may well ask whether it has made its `graph` yet.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from inspect import isfunction
from typing import Any

from torch import nn

from ..serving.per_site import SiteInterpreter
from .adaptation import Adaptation, of

_hidden: ContextVar[bool] = ContextVar("hidden", default=False)


@contextlib.contextmanager
def _names_hidden() -> Iterator[None]:
    token = _hidden.set(True)
    try:
        yield
    finally:
        _hidden.reset(token)


class Offered:
    """The descriptor of a name of lorafx's, which an adapted model looks up in `lorafx.of(model)`.

    Python asks it when neither the base's class nor the model's `__dict__` has the name.
    """

    def __init__(self, name: str):
        self.name = name
        self.__doc__ = getattr(Adaptation, name).__doc__

    def __get__(self, tree: Any, cls: type) -> Any:
        if tree is None:
            return self._unbound()
        with contextlib.suppress(AttributeError):
            return cls.__getattr__(tree, self.name)  # type: ignore[attr-defined]
        if _hidden.get() or SiteInterpreter.running(tree) is not None:
            raise AttributeError(f"{cls.__name__!r} object has no attribute {self.name!r}")
        return getattr(of(tree), self.name)

    def _unbound(self) -> Any:
        """What the class shows: a method that takes a model, as `AdaptedModel.merge_adapter(model)`, or a property."""
        offered = getattr(Adaptation, self.name)
        if not isfunction(offered):
            return offered
        return functools.wraps(offered)(lambda tree, *args, **kwargs: offered(of(tree), *args, **kwargs))


class OwnNamesFirst(nn.Module):
    """The part of an adapted model that lets the base register tensors and modules under any name."""

    def register_buffer(self, *args: Any, **kwargs: Any) -> None:
        with _names_hidden():
            super().register_buffer(*args, **kwargs)

    def register_parameter(self, *args: Any, **kwargs: Any) -> None:
        with _names_hidden():
            super().register_parameter(*args, **kwargs)

    def add_module(self, *args: Any, **kwargs: Any) -> None:
        with _names_hidden():
            super().add_module(*args, **kwargs)
