"""Choosing: each row of a call has its own adapter, and so has all that runs within the call.

Names are chosen for a call, or for all calls that `generate` makes. Which numbers they are is decided where a call is
served.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..adapters.by_row import first_tensor
from .call_key import Call


@dataclass(frozen=True)
class Choice:
    """The name of each row's adapter, None for the base alone, for calls of one model, told by its state.

    With `repeats` it is for the calls that `generate` makes, where a batch may have each row several times in
    succession, as beams are. `unnamed` says that nobody named adapters: each row has the active one.

    `starts`, (rows,), has the places of the tokens from which on the adapters of rows act; None if all act from the
    first. Places are counted from the first token of the call; in `generate` from the first in the cache, and there
    `prompt` is how many tokens there are once the prompts are read.
    """

    state: Any
    names: tuple[str | None, ...]
    repeats: bool = False
    starts: Tensor | None = None
    prompt: int | None = None
    unnamed: bool = False

    @property
    def within(self) -> Choice | None:
        """What calls within such a call have, which may be of other tokens: the names, if somebody gave them."""
        return None if self.unnamed else replace(self, starts=None, prompt=None)


class _Now(threading.local):
    choice: Choice | None = None


_NOW = _Now()


def chosen_for(state: Any) -> Choice | None:
    """What is chosen in this thread for calls of the model that has this state."""
    choice = _NOW.choice
    return choice if choice is not None and choice.state is state else None


@contextlib.contextmanager
def choosing(choice: Choice | None) -> Iterator[None]:
    """Have calls inside run with a choice, or with none."""
    outer, _NOW.choice = _NOW.choice, choice
    try:
        yield
    finally:
        _NOW.choice = outer


def has_one_token(call: Call) -> bool:
    """Whether each row of a call is one row of features, or one number."""
    first = first_tensor(call.named.values()) if call.context.numbers else None
    if first is None or first.ndim > 2:
        return False
    return first.ndim < 2 or first.is_floating_point() or first.shape[1] == 1
