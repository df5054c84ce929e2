"""What a call's arguments are called, which of them are images, and a call in one line for reports."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree


def argument_names(forward: Callable[..., Any], args: tuple[Any, ...]) -> list[str]:
    """What `forward` calls these positional arguments; one that goes to its `*args` is `arg_2`, by its place."""
    parameters = inspect.signature(forward).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [named[i] if i < len(named) else f"arg_{i}" for i in range(len(args))]


def images(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The arguments that are images or videos, (…, 3, height, width).

    A graph serves images of one height and width: models compute with these in Python (windows, patches, positions),
    and a capture in which they stay open takes minutes.
    """
    given = (*args, *kwargs.values())
    return [x for x in given if isinstance(x, Tensor) and x.ndim > 3 and x.shape[-3] == 3 and x.is_floating_point()]


def describe_call(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """A call in a line, for reports: `train, input_ids[2, 7], labels[2, 7]`."""
    named = {**dict(zip(argument_names(model.forward, args), args)), **kwargs}
    shown = [f"{name}{_brief(value)}" for name, value in named.items() if value is not None]
    return ", ".join(("train" if model.training else "eval", *shown))


def _brief(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(list(value.shape))
    holds_tensors = any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
    return f"={type(value).__name__}" if holds_tensors else f"={value!r}"
