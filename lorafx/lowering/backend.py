"""The backend: how an adapted model's graphs are compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule

from ..errors import ConfigError
from ..torch_private.compilers import CUDA_GRAPHS, inductor_modes, inductor_options, settings_of_mode

_OURS = "auto", "eager"
_GRAPHS = "reduce-overhead"  # the mode that is nothing but CUDA graphs


@dataclass(frozen=True)
class Backend:
    """How graphs are compiled: by whom, in which of Inductor's modes, with which activation memory budget.

    `name` is "eager", a `torch.compile` backend, or "auto": Inductor where the graph's parameters are on CUDA, the
    graph as it is elsewhere. `mode` is one of `torch._inductor.list_mode_options()`. Where that has CUDA graphs in it,
    lorafx records them itself, of eager graphs too: Inductor's own cannot have one compiled layer feed the next call of
    itself, and training fails. `budget` is AOTAutograd's, from 0 (recompute all) to 1 (keep all that it would keep by
    itself); None is that without norms and activations. Raises `ConfigError` for what is none of these.

    What somebody gave to torch.compile around an adapted model is a backend, too (`of`): `options` are then Inductor's
    settings, or `compiler` is what compiles, and `dynamic=False` has pieces compiled for each size.
    """

    name: str = "auto"
    mode: str | None = None
    budget: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    compiler: Callable[..., Any] | None = None
    dynamic: bool = True

    @classmethod
    def of(cls, compiler: Callable[..., Any], budget: float | None) -> Backend:
        """The backend that does what `compiler` does, which torch.compile made of its arguments."""
        options, dynamic = inductor_options(compiler), getattr(compiler, "dynamic", None) is not False
        if options is not None:
            return cls("inductor", budget=budget, options=options, dynamic=dynamic)
        return cls(str(getattr(compiler, "compiler_name", compiler)), None, budget, {}, compiler, dynamic)

    def __post_init__(self) -> None:
        if self.compiler is not None:
            return
        if self.budget is not None and not 0 <= self.budget <= 1:
            raise ConfigError(f"activation_budget={self.budget!r} is not between 0 and 1")
        if self.name not in _OURS and self.name not in (backends := torch.compiler.list_backends(exclude_tags=())):
            raise ConfigError(f"backend={self.name!r} is none of {', '.join([*_OURS, *backends])}")
        if self.mode is None:
            return
        if self.name not in ("auto", "inductor") and not (self.name == "eager" and self.mode == _GRAPHS):
            raise ConfigError(f"mode={self.mode!r} is one of Inductor's, and backend={self.name!r} has none")
        if self.mode not in (known := inductor_modes()):
            raise ConfigError(f"mode={self.mode!r} is none of {', '.join(known)}")

    @property
    def is_asked_for(self) -> bool:
        """Whether somebody wants calls compiled or recorded, rather than served in whatever way is best."""
        return self.compiler is not None or self.name not in _OURS or self.mode is not None

    @property
    def records(self) -> bool:
        """Whether calls on CUDA are recorded and replayed."""
        return self._all_settings.get(CUDA_GRAPHS, False)

    @property
    def settings(self) -> dict[str, Any]:
        """What the mode and the options set of Inductor's configuration."""
        return {name: value for name, value in self._all_settings.items() if name != CUDA_GRAPHS}

    @property
    def _all_settings(self) -> dict[str, Any]:
        return (settings_of_mode(self.mode) if self.mode else {}) | self.options

    def on(self, gm: GraphModule) -> str:
        """The name of what compiles this graph; "eager" if nothing does."""
        if self.compiler is not None:
            return f"torch.compile's {self.name}"
        if self.name != "auto":
            return self.name
        return "inductor" if any(p.is_cuda for p in gm.parameters()) else "eager"
