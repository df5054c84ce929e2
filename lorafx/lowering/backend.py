"""The backend: how an adapted model's graphs are compiled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from ..errors import ConfigError
from ..torch_private.compilers import inductor_modes

_OURS = "auto", "eager"


@dataclass(frozen=True)
class Backend:
    """How graphs are compiled: by whom, in which of Inductor's modes, with which activation memory budget.

    `name` is "eager", a `torch.compile` backend, or "auto": Inductor where the graph's parameters are on CUDA, the
    graph as it is elsewhere. `mode` is one of `torch._inductor.list_mode_options()`. `budget` is AOTAutograd's, from 0
    (recompute all) to 1 (keep all that it would keep by itself); None is that without norms and activations. Raises
    `ConfigError` for what is none of these.
    """

    name: str = "auto"
    mode: str | None = None
    budget: float | None = None

    def __post_init__(self) -> None:
        if self.budget is not None and not 0 <= self.budget <= 1:
            raise ConfigError(f"activation_budget={self.budget!r} is not between 0 and 1")
        if self.name not in _OURS and self.name not in (backends := torch.compiler.list_backends(exclude_tags=())):
            raise ConfigError(f"backend={self.name!r} is none of {', '.join([*_OURS, *backends])}")
        if self.mode is None:
            return
        if self.name not in ("auto", "inductor"):
            raise ConfigError(f"mode={self.mode!r} is one of Inductor's, and backend={self.name!r} has none")
        if self.mode not in (known := inductor_modes()):
            raise ConfigError(f"mode={self.mode!r} is none of {', '.join(known)}")

    def on(self, gm: GraphModule) -> str:
        """The name of what compiles this graph."""
        on_cuda = self.name == "auto" and any(p.is_cuda for p in gm.parameters())
        return "inductor" if on_cuda else self.name.replace("auto", "eager")
