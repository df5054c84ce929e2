"""Hooks of a mirror's modules: what interprets the modules' own Python (`serving/per_site.py`) does not see them run.

A hook that casts or loads a weight for the time of a call reads that weight, as an operator does that an adapter acts
on. It means the base's, and no adapter acts on what a hook computes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

Suspend = Callable[[], AbstractContextManager[None]]


class Running(threading.local):
    """What runs modules' own Python in a thread now, if anything does; `suspended()` of it runs hooks outside.

    `captured` is the tree of which a call is captured, if one is.
    """

    mode: Any = None
    captured: Any = None

    def runs(self, tree: Any) -> bool:
        """Whether a tree's own Python runs now, and not a hook."""
        return self.captured is tree or (self.mode is not None and self.mode.tree is tree)


RUNNING = Running()


class Hooks(OrderedDict[int, Any]):
    """Hooks by number, as nn.Module keeps them: `items` are what it calls, `values` are the hooks themselves."""

    @classmethod
    def of(cls, hooks: Mapping[int, Any]) -> Hooks:
        """The same hooks, to be called outside."""
        return cls(zip(hooks.keys(), hooks.values()))

    def items(self) -> Any:
        """The hooks as they are to be called."""
        mode = RUNNING.mode
        if mode is None:
            return super().items()
        return [(number, _outside(hook, mode.suspended)) for number, hook in super().items()]

    def copy(self) -> Hooks:
        """The same hooks in another dict."""
        return Hooks.of(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hooks, (list(zip(self.keys(), self.values())),)


def _outside(hook: Callable[..., Any], suspended: Suspend) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with suspended():
            return hook(*args, **kwargs)

    return run
