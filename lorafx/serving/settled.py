"""A call in the one form in which equal calls are equal."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn


def settled(tree: nn.Module, path: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Named keyword arguments in one order, without those that only say None where that is the default."""
    named = _named(type(tree.get_submodule(path)))  # type: ignore[arg-type]
    given = {name: kwargs[name] for name in named if name in kwargs}
    rest = {name: value for name, value in kwargs.items() if name not in named}
    return {name: value for name, value in given.items() if value is not None or named[name] is not None} | rest


@functools.cache
def _named(module: type[nn.Module]) -> dict[str, Any]:
    """The parameters of a forward that can be given by name, and their defaults."""
    parameters = inspect.signature(module.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
