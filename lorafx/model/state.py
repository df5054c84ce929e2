"""State: what an adapted model is besides a module tree."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from ..adapters.adapter import Adapter
from ..merging.ledger import Ledger
from ..pipeline import Context
from ..serving.dispatcher import Dispatcher


@dataclass
class State:
    """The base object, the dispatcher of calls, the adapters by name, which are active, and which are merged.

    `base_requires_grad` has the base's flags by path, as they were before lorafx froze it.
    """

    base: nn.Module
    dispatcher: Dispatcher
    autocast_adapter_dtype: bool
    base_requires_grad: dict[str, bool]
    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def context(self) -> Context:
        """The adapters that act, merged ones innermost, since they are part of W."""
        names = dict.fromkeys((*self.ledger.names, *self.active))
        return Context(tuple(self.adapters[name] for name in names), frozenset(self.ledger.names))
