"""Lower: a rewritten graph becomes what runs, the graph itself or a compiled form of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule


def lower(gm: GraphModule, backend: str) -> Callable[..., Any]:
    """The callable that serves calls of `gm`.

    `backend` is "eager", a `torch.compile` backend, or "auto": Inductor where the graph's parameters are on CUDA, the
    graph as it is elsewhere. Sizes stay dynamic.
    """
    if backend == "auto":
        backend = "inductor" if any(p.is_cuda for p in gm.parameters()) else "eager"
    return gm if backend == "eager" else torch.compile(gm, backend=backend, dynamic=True)
