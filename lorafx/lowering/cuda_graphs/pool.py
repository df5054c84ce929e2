"""Pool: the memory that the recordings of one device share, and whose call it is kept for."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from torch import Tensor


@dataclass(eq=False)
class Ticket:
    """A call that was replayed and whose backward may come."""

    random: Tensor  # the state of the random numbers before the call
    versions: list[int]  # of the model's parameters in the call
    done: bool = False


class Pool:
    """Which call needs what lies in the pool for its backward. Only one may, for the next replay writes over it."""

    def __init__(self) -> None:
        self._last: weakref.ref[Ticket] | None = None

    def is_free(self) -> bool:
        """Whether nobody waits for a backward: it has run, or what it would start from is gone."""
        ticket = None if self._last is None else self._last()
        return ticket is None or ticket.done

    def holds(self, ticket: Ticket) -> bool:
        """Whether backward of this call can run."""
        return self._last is not None and self._last() is ticket and not ticket.done

    def take(self, ticket: Ticket) -> None:
        """Keep what is there for this call's backward."""
        self._last = weakref.ref(ticket)
