"""What is switched off, set or kept aside while a model is captured, each as a context."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import sys
from collections.abc import Iterator
from typing import Any

import torch

from ..torch_private.replacing import fastpath_replaced
from ..torch_private.tensors import global_call_hooks, has_saved_tensors_hooks, temporarily_clear_interpreter_stack
from .padding import encode


@contextlib.contextmanager
def outside_transforms() -> Iterator[None]:
    """Leave inference mode, torch.func's transforms and checkpointed functions, but keep the gradient mode."""
    grad = torch.is_grad_enabled()
    hooks: Any = contextlib.nullcontext()
    if has_saved_tensors_hooks():
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with temporarily_clear_interpreter_stack(), torch.inference_mode(False), torch.set_grad_enabled(grad), hooks:
        yield


@contextlib.contextmanager
def collecting_later() -> Iterator[None]:
    """Keep Python from collecting garbage: it would walk over large graphs, and tracing makes hardly any cycles.

    What others have left to be collected may close files, which would look as if the model did that.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from logging and printing pages before it raises an error: the reason is in the error."""
    logger, printed = logging.getLogger("torch"), io.StringIO()
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(printed):
            yield
    finally:
        logger.setLevel(before)
    sys.stderr.write(printed.getvalue())


def plain_operators() -> contextlib.AbstractContextManager[None]:
    """Keep torch.nn's encoder layers from running as one kernel, which reads many weights and no adapter can act in.

    Encoders give the same without it, padded positions included.
    """
    return fastpath_replaced(encode)


@contextlib.contextmanager
def without_global_hooks() -> Iterator[None]:
    """Keep hooks around every module of the process from seeing the modules that only a capture has."""
    before = [(hooks, hooks.copy()) for hooks in global_call_hooks()]
    for hooks, _ in before:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, own in before:
            hooks.update(own)
