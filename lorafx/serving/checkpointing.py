"""Checkpointing: transformers' layers are asked for checkpoints that autograd can see through.

A re-entrant checkpoint runs its layer without gradients, and again in backward if an input wants one. A frozen base's
input wants none, unless its embeddings are made to; given `inputs_embeds` nothing would train. It is no part of a graph
either. The other kind gives the same gradients, for any input. A layer whose rows have adapters of their own has the
same ones when it runs again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from .choosing import as_now

FUNCTION = "_gradient_checkpointing_func"  # what transformers calls a module's checkpoint, with its options


def without_reentrant(modules: Iterable[nn.Module]) -> bool:
    """Give those modules that checkpoint re-entrantly torch's other kind of checkpoint, with their other options.

    torch's own default is the re-entrant kind, which PEFT's preparation of quantised models leaves as it is. The result
    is whether there were any: a trainer may enable checkpoints anew in each step.
    """
    changed = False
    for module in modules:
        function = vars(module).get(FUNCTION)
        if not isinstance(function, partial):
            continue
        is_torchs, options = function.func is checkpoint, function.keywords
        if is_torchs or options.get("use_reentrant"):
            made = checkpoint_by_row if is_torchs else function.func
            vars(module)[FUNCTION] = partial(made, *function.args, **{**options, "use_reentrant": False})
            changed = True
    return changed


def checkpoint_by_row(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """torch's checkpoint, of a function that runs again with what rows have chosen now."""
    return checkpoint(as_now(function), *args, **options)
