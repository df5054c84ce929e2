"""Functions put in the place of others while a model is captured: Python's `range`, a cache layer's methods and more.

Neither torch nor transformers promises that models get at these functions by these names.
"""

from __future__ import annotations

import contextlib
import functools
import keyword
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn
from torch.fx import graph as fx_graph
from torch.utils.checkpoint import CheckpointFunction, _CheckpointFrame
from transformers.cache_utils import DynamicSlidingWindowLayer

# The method as transformers has it, for layers that keep more than their window.
plain_update = DynamicSlidingWindowLayer.update


@contextlib.contextmanager
def range_replaced(model: nn.Module, function: Callable[..., range]) -> Iterator[None]:
    """Let the files that define a model's modules find `function` when they say `range`; torch's own files do not.

    A name of a file goes before a builtin. Were it not so, loops over a size would be unrolled, for this size alone.
    """
    names = {type(module).__module__ for module in model.modules()}
    files = [vars(sys.modules[name]) for name in names if name in sys.modules and not name.startswith("torch.")]
    without_own = [file for file in files if "range" not in file]
    for file in without_own:
        file["range"] = function
    try:
        yield
    finally:
        for file in without_own:
            del file["range"]


@contextlib.contextmanager
def sliding_windows_replaced(update: Callable[..., Any], get_mask_sizes: Callable[..., Any]) -> Iterator[None]:
    """Let transformers' cache layers with a sliding window run these methods. They use its attributes.

    Were it not so, a cache that fills up would need a graph before its window is full, one just then, one after it.
    """
    own = {name: vars(DynamicSlidingWindowLayer)[name] for name in ("update", "get_mask_sizes")}
    DynamicSlidingWindowLayer.update, DynamicSlidingWindowLayer.get_mask_sizes = update, get_mask_sizes  # type: ignore
    try:
        yield
    finally:
        for name, method in own.items():
            setattr(DynamicSlidingWindowLayer, name, method)


@contextlib.contextmanager
def function_applications_seen(see: Callable[[type], None]) -> Iterator[None]:
    """Call `see(cls)` before an autograd function is applied, by whatever name somebody has kept its `apply`.

    An application makes a node of a class that is the function's own, and below this one. Tracers see through such
    functions. Were it not so, nobody would know that one with a backward of its own ran.
    """
    base: Any = torch.autograd.function.BackwardCFunction
    with _LOCK:
        _SEEING.append(see)
        base.__init__ = _tell_of
    try:
        yield
    finally:
        with _LOCK:
            _SEEING.remove(see)
            if not _SEEING:
                del base.__init__


_SEEING: list[Callable[[type], None]] = []  # who is told of applications, in whatever thread
_LOCK = threading.Lock()


def _tell_of(node: Any) -> None:
    for see in tuple(_SEEING):
        see(type(node)._forward_cls)


@contextlib.contextmanager
def environment_replaced(read: Callable[..., str]) -> Iterator[None]:
    """Let environment variables be read by `read(plain, os.environ, name)`, whichever way the model asks for them.

    Were it not so, nobody would know that a graph depends on one.
    """
    kind: Any = type(os.environ)
    plain = kind.__getitem__
    kind.__getitem__ = lambda environment, name: read(plain, environment, name)
    try:
        yield
    finally:
        kind.__getitem__ = plain


@contextlib.contextmanager
def inference_question_replaced(ask: Callable[..., bool]) -> Iterator[None]:
    """Let `torch.is_inference_mode_enabled()` be `ask(plain)`. Were it not so, a graph would have the wrong answer."""
    plain = torch.is_inference_mode_enabled
    torch.is_inference_mode_enabled = lambda: ask(plain)
    try:
        yield
    finally:
        torch.is_inference_mode_enabled = plain


def checkpoints_replaced(again: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Let torch's checkpoints run `again(function)` in backward, made when the function runs first, of either kind.

    Were it not so, what a model checkpoints would run in backward as though it were no part of a model's call.
    """
    forward, init = CheckpointFunction.forward, _CheckpointFrame.__init__

    @functools.wraps(forward)
    def reentrant(ctx: Any, function: Callable[..., Any], *rest: Any) -> Any:
        outputs = forward(ctx, function, *rest)
        ctx.run_function = again(function)
        return outputs

    @functools.wraps(init)
    def other(frame: Any, function: Callable[..., Any], *rest: Any, **options: Any) -> None:
        init(frame, again(function), *rest, **options)

    CheckpointFunction.forward, _CheckpointFrame.__init__ = staticmethod(reentrant), other  # type: ignore


def threads_replaced(within: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Let threads run `within(function)`, made where a thread is started or a pool is given something to do.

    Were it not so, a weight that a model's thread reads would be the base's.
    """
    start: Any = threading.Thread.start
    submit: Any = ThreadPoolExecutor.submit

    local = threading.local()  # a pool's own threads outlive what they are started for

    @functools.wraps(start)
    def start_within(thread: Any) -> None:
        run = thread.run
        if not getattr(local, "submits", False) and (inside := within(run)) is not run:
            thread.run = inside
        start(thread)

    @functools.wraps(submit)
    def submit_within(pool: Any, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        local.submits = True
        try:
            return submit(pool, within(function), *args, **kwargs)
        finally:
            local.submits = False

    threading.Thread.start, ThreadPoolExecutor.submit = start_within, submit_within  # type: ignore


def scripts_replaced(run: Callable[..., Any]) -> None:
    """Let functions and methods of TorchScript be run by `run(plain, script, args, kwargs)`.

    Were it not so, nobody would know what they are given: torch functions that run inside are told to nobody.
    """
    for kind in (torch._C.ScriptFunction, torch._C.ScriptMethod):
        _replace_call(kind, run)


def _replace_call(kind: Any, run: Callable[..., Any]) -> None:
    plain = kind.__call__

    def call(script: Any, /, *args: Any, **kwargs: Any) -> Any:
        return run(plain, script, args, kwargs)

    kind.__call__ = call


# The forward that torch has for `nn.TransformerEncoder`, which reads four attributes of what it is called with.
plain_encoder = torch.nn.TransformerEncoder.forward


class _Fastpath:
    """Torch's switch for encoders that run as one kernel, off while anybody needs it off, in whatever thread."""

    def __init__(self) -> None:
        self.lock, self.users, self.was_on = threading.Lock(), 0, True

    def off(self, encoder: Callable[..., Any]) -> None:
        with self.lock:
            if not self.users:
                self.was_on = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
                torch.nn.TransformerEncoder.forward = encoder if self.was_on else plain_encoder  # type: ignore
            self.users += 1

    def back(self) -> None:
        with self.lock:
            self.users -= 1
            if not self.users:
                torch.backends.mha.set_fastpath_enabled(self.was_on)
                torch.nn.TransformerEncoder.forward = plain_encoder  # type: ignore[method-assign]


_FASTPATH = _Fastpath()


@contextlib.contextmanager
def fastpath_replaced(encoder: Callable[..., Any]) -> Iterator[None]:
    """Keep encoder layers from running as one kernel; where they did, let encoders run `encoder`.

    The kernel reads many weights, and no adapter could act in it. But what an encoder gives depends on it.
    """
    _FASTPATH.off(encoder)
    try:
        yield
    finally:
        _FASTPATH.back()


def _attribute_text(base: str, target: str) -> str:
    """How a graph's code reads an attribute by its dotted name, whatever a `ModuleDict` calls its entries."""
    for name in target.split("."):
        is_plain = name.isidentifier() and not keyword.iskeyword(name)
        base = f"{base}.{name}" if is_plain else f"getattr({base}, {name!r})"
    return base


# Torch's own writes keywords, and names with quotes, as they are. Without it, a module called `class` is in no graph.
fx_graph._format_target = _attribute_text
