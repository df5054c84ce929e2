"""Pieces: functions that are compiled, and the modules by which a graph runs them.

A piece is a block of the graph, a run of operators between blocks, or a whole graph. Its parameters are inputs, so one
piece serves all layers of a kind, and adapters of equal shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from ..ops.modes import is_recorded
from ..progress import announced
from ..torch_private.compilers import (
    ACTIVATION_BUDGET,
    KEEP_MATERIALIZED,
    aot_autograd,
    lookup_backend,
    recompile_reason,
)
from .backend import Backend
from .eager import reader


class Piece:
    """One function that is compiled, how often it has been, and torch's reasons for each time after the first."""

    def __init__(self, title: str, function: Callable[..., Any], compiler: str, backend: Backend):
        self.title, self.compiled = title, 0
        self.reasons: list[str] = []
        self._backend = backend.compiler or lookup_backend(compiler)
        # What norms and activations give is recomputed where backward needs it, unless there is room for everything.
        self._settings: dict[str, Any] = {KEEP_MATERIALIZED: backend.budget == 1}
        if backend.budget is not None:
            self._settings[ACTIVATION_BUDGET] = backend.budget
        self._options: dict[str, Any] = {"config_patches": _patches(backend)} if compiler == "inductor" else {}
        self.run = torch.compile(function, backend=self._compile, dynamic=backend.dynamic)

    def _compile(self, gm: GraphModule, inputs: Any, **options: Any) -> Callable[..., Any]:
        if is_recorded():  # kernels are tried out, which would spoil the recording
            raise RuntimeError(f"{self.title}: to be compiled while a CUDA graph is recorded: {_reason()}")
        self.compiled += 1
        if self.compiled > 1:
            self.reasons.append(_reason())
        with announced(f"compiling {self.title}"), aot_autograd.patch(self._settings):
            return self._backend(gm, inputs, **options, **self._options)


def _patches(backend: Backend) -> dict[str, Any]:
    """What is set of Inductor's configuration while it compiles a piece; a pass that somebody has set stays."""
    from ..torch_private.inductor import POST_PASS, inductor  # takes seconds, and most models are never compiled
    from .inductor import OurPasses

    return {POST_PASS: getattr(inductor, POST_PASS) or OurPasses()} | backend.settings


def _reason() -> str:
    """Why torch compiles a function again, asked while it does."""
    reason = recompile_reason() or "torch does not say why"
    return " ".join(str(reason).split())


class Compiled(nn.Module):
    """A module that runs a piece."""

    def __init__(self, piece: Piece):
        super().__init__()
        self.__dict__["piece"] = piece  # past nn.Module's own `__setattr__`, as reading it is past `__getattr__`

    def forward(self, *inputs: Any) -> Any:
        return self.__dict__["piece"].run(*inputs)


class CompiledBlock(Compiled):
    """A module that runs a block's piece on the parameters of a layer, which are the piece's first inputs."""

    def __init__(self, piece: Piece, paths: list[str]):
        super().__init__(piece)
        self.__dict__["read"] = reader(["layer"], [f"layer.{path}" for path in paths])

    def forward(self, layer: nn.Module, *inputs: Any) -> Any:
        return super().forward(*self.__dict__["read"](layer), *inputs)
