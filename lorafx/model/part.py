"""Part: the base of all classes that work on an adapted model, on its module tree and its state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from ..adapters.adapter import Adapter
from ..errors import AdapterError
from ..tree.hooks import RUNNING
from ..tree.mirror import STATE
from .state import State

if TYPE_CHECKING:
    from .adapted_model import AdaptedModel


P = ParamSpec("P")
R = TypeVar("R")


def between_calls(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """A method that changes what acts: `AdapterError` within a call, which goes on with what it began with."""

    @functools.wraps(method)
    def checked(self: Part, *args: P.args, **kwargs: P.kwargs) -> R:
        if RUNNING.runs(self.tree):
            raise AdapterError(
                f"{method.__name__}() within a call of the model that it changes, which goes on with the adapters that "
                "it began with: call it before or after"
            )
        return method(self, *args, **kwargs)

    return checked


class Part:
    """A part of what `lorafx.of` gives: methods that work on a model's tree and its state.

    The tree is never asked for a name of lorafx's, since the base model may use the same name for something else.
    """

    def __init__(self, tree: AdaptedModel):
        self.tree = tree

    @property
    def _lorafx(self) -> State:
        state: State = vars(self.tree)[STATE]
        return state

    @staticmethod
    def _listed(names: str | Iterable[str]) -> tuple[str, ...]:
        """Names of adapters, each once; one may be given as it is, for its letters are no names."""
        return (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))

    def _adapter(self, name: str) -> Adapter:
        if name not in self._lorafx.adapters:
            raise AdapterError(f"there is no adapter {name!r}; there are {list(self._lorafx.adapters)}")
        return self._lorafx.adapters[name]
