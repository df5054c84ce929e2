"""Checkpointing: what runs again in backward is served as it was in forward.

Where no graph is run, a checkpoint of whatever kind is part of a model's own Python. What it runs again in backward
runs by sites once more, with the adapters that its rows had. So does what a model has other threads run.

transformers' layers are asked for checkpoints that autograd can see through. A re-entrant checkpoint runs its layer
without gradients, and again in backward if an input wants one. A frozen base's input wants none, unless its
embeddings are made to; given `inputs_embeds` nothing would train. It is no part of a graph either. The other kind
gives the same gradients, for any input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from ..tree.hooks import RUNNING

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
        asked = function.keywords.get("use_reentrant", function.func is checkpoint)
        if asked or asked is None:
            options = {**function.keywords, "use_reentrant": False}
            vars(module)[FUNCTION] = partial(function.func, *function.args, **options)
            changed = True
    return changed


def as_served_now(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that a model checkpoints, or has a thread run, which acts as it would in the call of the model."""
    mode = RUNNING.mode
    if mode is None:
        return function
    interpreter = mode.from_here()

    def again(*args: Any, **kwargs: Any) -> Any:
        with interpreter().active() as running:
            try:
                return function(*args, **kwargs)
            finally:
                mode.acted = mode.acted or running.acted

    return again
