"""State: what an adapted model is besides a module tree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, NoReturn

from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.config import AdapterConfig
from ..errors import AdapterError
from ..lowering.backend import Backend
from ..merging.ledger import Ledger
from ..pipeline import Context
from ..serving.dispatcher import Dispatcher
from ..tree.attached import Held
from ..tree.originals import Originals
from ..tree.replication import Replicas


class Found(NamedTuple):
    """Which adapters act, are merged and train, as a block found them in which none does."""

    disabled: bool
    active: tuple[str, ...]
    merged: tuple[str, ...]
    names: set[str]
    trained: list[Tensor]


@dataclass
class State:
    """The base object, the dispatcher of calls, the adapters by name, which are active, and which are merged.

    `base_requires_grad` has the base's flags by path, before lorafx froze it; `originals` are its modules, as they were
    then; `replicas` are its layers in the memory of others. While the adapters are `disabled`, none acts, and `active`
    says which will when that is over. `trained` are those that lorafx has let train and not frozen since. `compiled`
    has a dispatcher for each torch.compile around the model; a copy makes its own.
    """

    base: nn.Module
    dispatcher: Dispatcher
    autocast_adapter_dtype: bool
    base_requires_grad: dict[str, bool]
    originals: Originals
    replicas: Replicas | None = None
    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    disabled: bool = False
    blocks: dict[object, Found] = field(default_factory=dict)  # those that run as the base, in the order they began
    trained: set[str] = field(default_factory=set)
    # Of each adapter's first tensor: the parameters of its module, and its name among these.
    first: dict[str, tuple[dict[str, Any], str]] = field(default_factory=dict)
    held: dict[str, Held] = field(default_factory=dict)  # what holds an adapter's tensors in the tree
    said: set[str] = field(default_factory=set)  # what `backward.py` says once
    given: set[str] = field(default_factory=set)  # adapters whose start values nobody needs to be reminded of
    layers_of_peft: nn.ModuleList | None = None  # what PEFT's optimizers last took for layers
    ledger: Ledger = field(default_factory=Ledger)
    allocators: dict[str, Any] = field(default_factory=dict)  # of adapters whose ranks training shares out
    configs: Configs = field(init=False)
    compiled: list[tuple[Callable[..., Any], Dispatcher]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.configs = Configs(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "compiled": [], "first": {}, "held": {}, "blocks": {}}

    @property
    def acting(self) -> tuple[str, ...]:
        """Names of the adapters that act, apart from merged ones."""
        return () if self.disabled else self.active

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

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise AdapterError(
            "the configs of a model's adapters are not written to, as peft's own functions would: "
            "`add_adapter(name, config)` puts another adapter on the model, `delete_adapter(name)` removes one"
        )

    __setitem__ = __delitem__ = update = setdefault = pop = popitem = clear = _refuse
