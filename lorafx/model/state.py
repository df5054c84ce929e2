"""State: what an adapted model is besides a module tree, and the base of all classes that work on both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from ..adapters.adapter import Adapter
from ..adapters.config import AdapterConfig
from ..errors import AdapterError
from ..merging.ledger import Ledger
from ..pipeline import Context
from ..serving.dispatcher import Dispatcher
from ..tree.mirror import STATE

if TYPE_CHECKING:
    from .adapted_model import AdaptedModel


@dataclass
class State:
    """The base object, the dispatcher of calls, the adapters by name, which are active, and which are merged.

    `base_requires_grad` has the base's flags by path, as they were before lorafx froze it. While the adapters are
    `disabled`, none acts, and `active` says which will when that is over.
    """

    base: nn.Module
    dispatcher: Dispatcher
    autocast_adapter_dtype: bool
    base_requires_grad: dict[str, bool]
    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    disabled: bool = False
    said_no_dropout: bool = False  # that it was trained in evaluation mode
    ledger: Ledger = field(default_factory=Ledger)
    configs: Configs = field(init=False)

    def __post_init__(self) -> None:
        self.configs = Configs(self)

    @property
    def acting(self) -> tuple[str, ...]:
        """Names of the adapters that act, apart from merged ones."""
        return () if self.disabled else self.active

    @property
    def context(self) -> Context:
        """The adapters that act, merged ones innermost, since they are part of W."""
        names = dict.fromkeys((*self.ledger.names, *self.acting))
        return Context(tuple(self.adapters[name] for name in names), frozenset(self.ledger.names))


class Configs(Mapping[str, AdapterConfig]):
    """The config of each adapter by name, as it is whenever somebody looks; not to be written to."""

    def __init__(self, state: State):
        self._state = state

    def __getitem__(self, name: str) -> AdapterConfig:
        return self._state.adapters[name].config

    def __iter__(self) -> Iterator[str]:
        return iter(self._state.adapters)

    def __len__(self) -> int:
        return len(self._state.adapters)

    def __repr__(self) -> str:
        return repr(dict(self))


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

    def _adapter(self, name: str) -> Adapter:
        if name not in self._lorafx.adapters:
            raise AdapterError(f"there is no adapter {name!r}; there are {list(self._lorafx.adapters)}")
        return self._lorafx.adapters[name]
