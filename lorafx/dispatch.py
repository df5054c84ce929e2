"""Dispatch: which graph serves a call. Each kind of call is captured once, rewritten by the pipeline, and kept."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import GraphModule

from .capture import call_key, describe_call, refresh, trace_part
from .errors import CaptureError
from .lower import lower
from .pipeline import Context, Observer, Pipeline
from .report import Step
from .tree import layout


@dataclass(frozen=True)
class Program:
    """A rewritten graph that serves calls, and how it came about."""

    title: str
    gm: GraphModule
    run: Any
    steps: tuple[Step, ...]
    capture_seconds: float


class GuardFailed(Exception):
    """A kept graph does not fit the call's sizes."""


@dataclass
class Dispatcher:
    """The graphs of one adapted tree. They are never copied or pickled with it: a copy captures its own."""

    pipeline: Pipeline
    backend: str
    observers: tuple[Observer, ...] = ()
    programs: dict[Hashable, list[Program]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "programs": {}}

    def __iter__(self):  # type: ignore[no-untyped-def]
        return (program for kept in self.programs.values() for program in kept)

    def serve(self, tree: nn.Module, context: Context, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call of the module at `path` below `tree` through its graph; captured now if none fits."""
        for program in self.programs.get(_key(tree, context, path, args, kwargs), ()):
            with contextlib.suppress(GuardFailed):
                return _run(program, tree, args, kwargs)
        program = self._build(tree, context, path, args, kwargs)
        try:
            return _run(program, tree, args, kwargs)
        except GuardFailed as error:
            self._forget(program)
            raise CaptureError(f"the graph captured from this very call does not accept it: {error}") from error

    def graph(self, tree: nn.Module, context: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GraphModule:
        """The graph that serves a call of the whole model, without running it."""
        kept = self.programs.get(_key(tree, context, "", args, kwargs))
        program = kept[-1] if kept else self._build(tree, context, "", args, kwargs)
        refresh(program.gm, tree)
        return program.gm

    def _build(
        self, tree: nn.Module, context: Context, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Program:
        """Capture, rewrite, lower, keep."""
        start = time.perf_counter()
        gm = trace_part(tree, path, args, kwargs)
        seconds = time.perf_counter() - start
        steps = self.pipeline.run(gm, context, self.observers)
        call = describe_call(tree.get_submodule(path), args, kwargs)
        program = Program(f"{path}({call})" if path else call, gm, lower(gm, self.backend), steps, seconds)
        # The key as it is now: a model may settle something in its config the first time it runs.
        self.programs.setdefault(_key(tree, context, path, args, kwargs), []).append(program)
        return program

    def _forget(self, program: Program) -> None:
        for kept in self.programs.values():
            kept[:] = [other for other in kept if other is not program]


def _key(tree: nn.Module, context: Context, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    """All that a graph is specialised on: the call, the tree's modes and dtypes, the adapters, the model's settings."""
    names = tuple(adapter.name for adapter in context.adapters)
    return path, call_key(args, kwargs), layout(tree), names, context.merged, _settings(tree)


def _settings(model: nn.Module) -> Hashable:
    """The plain values of a model's config, which its forward may read (`use_cache` and the like)."""
    config = getattr(model, "config", None)
    values = vars(config).items() if hasattr(config, "__dict__") else ()
    return tuple((key, value) for key, value in values if isinstance(value, (bool, int, float, str)))


def _run(program: Program, tree: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    refresh(program.gm, tree)
    try:
        return program.run(*args, **kwargs)
    except AssertionError as error:
        if str(error).startswith("Guard failed"):  # the first thing a graph does, before it computes anything
            raise GuardFailed(str(error)) from error
        raise
