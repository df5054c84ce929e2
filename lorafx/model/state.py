"""State: what an adapted model is besides a module tree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ..adapters.adapter import Adapter
from ..lowering.backend import Backend
from ..merging.ledger import Ledger
from ..pipeline import Context
from ..serving.dispatcher import Dispatcher


@dataclass
class State:
    """The base object, the dispatcher of calls, the adapters by name, which are active, and which are merged.

    `base_requires_grad` has the base's flags by path, as they were before lorafx froze it. `compiled` has a dispatcher
    for each torch.compile that somebody put around the model, with what that compiles with; a copy makes its own.
    """

    base: nn.Module
    dispatcher: Dispatcher
    autocast_adapter_dtype: bool
    base_requires_grad: dict[str, bool]
    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    ledger: Ledger = field(default_factory=Ledger)
    compiled: list[tuple[Callable[..., Any], Dispatcher]] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "compiled": []}

    @property
    def dispatchers(self) -> Iterator[Dispatcher]:
        """All that serve calls: the model's own, and those for a torch.compile around it."""
        yield self.dispatcher
        yield from (dispatcher for _, dispatcher in self.compiled)

    def dispatcher_within(self, compiler: Callable[..., Any] | None) -> Dispatcher:
        """What serves calls within a torch.compile that compiles with this; within none if it is None."""
        if compiler is None:
            return self.dispatcher
        for known, dispatcher in self.compiled:
            if known == compiler:
                return dispatcher
        backend = Backend.of(compiler, self.dispatcher.backend.budget)
        self.compiled.append((compiler, replace(self.dispatcher, backend=backend)))
        return self.compiled[-1][1]

    def forget_programs(self) -> None:
        """Forget every program, and all that was learnt from calls."""
        self.compiled = []
        self.dispatcher.clear()

    @property
    def context(self) -> Context:
        """The adapters that act, merged ones innermost, since they are part of W."""
        names = dict.fromkeys((*self.ledger.names, *self.active))
        return Context(tuple(self.adapters[name] for name in names), frozenset(self.ledger.names))
