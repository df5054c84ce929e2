"""Conversion: the layers of a base model become layers that store their weight in another way."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from ..adapters.selection import is_named
from ..adapters.storages import Float8Linear
from ..errors import AdapterError, ConfigError, SelectionError
from ..ops.float8 import MULTIPLE
from ..tree.lookup import given_by
from .adapted_model import AdaptedModel

_KEPT_WIDE = "_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"  # transformers' names of layers, on its models
Places = list[tuple[nn.Module, str]]  # the modules that a layer hangs below, and what each calls it


def to_float8(model: nn.Module, modules: str | Sequence[str] | None = None) -> nn.Module:
    """Hold the weights of a base's linear layers in float8 from now on, and return the model. In place.

    A weight takes a byte a number and four a row; each number is off by at most 1/16 of itself, which no conversion
    brings back. Layers are replaced one by one, so that besides the model there are copies of one weight in memory;
    biases are the same parameters. Any device, also meta. Convert before `lorafx.compile`: adapters are selected,
    trained and saved as ever, and the pass `lorafx.passes.MultiplyInFloat8` multiplies in float8. Without it W is made
    dense in each call, and in eager training kept so until backward.

    Args:
        modules: which layers, as in `target_modules`: endings of names, or a regex for whole names. None means all but
            the output head.

    A layer stays as it is if it is of a class other than nn.Linear, if a size of its weight is no multiple of 16, if
    other modules share the weight, or if transformers keeps the model's layers of its name in float32 (T5's `wo`).

    Raises:
        ConfigError: a weight that is trainable, a regex that is none.
        SelectionError: there is no such layer.
        AdapterError: the model is adapted already. The model is as it was in each case.
    """
    if isinstance(model, AdaptedModel):
        raise AdapterError("the model is adapted already; convert its base before `lorafx.compile`")
    try:
        chosen = _chosen(model, modules)
    except re.error as error:
        raise ConfigError(f"modules={modules!r} is no regular expression: {error}") from error
    if not chosen:
        raise SelectionError(f"no nn.Linear of sizes that are multiples of {MULTIPLE} to convert (modules={modules!r})")
    if trained := next((name for name, layer in chosen.items() if layer.weight.requires_grad), None):
        raise ConfigError(
            f"{trained}.weight is trainable, and a weight in float8 gets no gradient: freeze the base first "
            "(`model.requires_grad_(False)`), or leave the layer out (`modules`)"
        )
    layers = [(layer, _places(model, layer)) for layer in chosen.values()]
    del chosen
    while layers:
        _replace(*layers.pop())
    return model


def _chosen(model: nn.Module, modules: str | Sequence[str] | None) -> dict[str, nn.Linear]:
    """The layers to convert by name, each once."""
    head = given_by(model, "get_output_embeddings")
    kept = {each for names in _KEPT_WIDE for each in getattr(model, names, None) or ()}
    owners = Counter(id(own) for module in model.modules() for own in module._parameters.values())
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and (module is not head if modules is None else is_named(modules, name))
        and owners[id(module.weight)] == 1
        and kept.isdisjoint(name.split("."))
        and not any(size % MULTIPLE for size in module.weight.shape)
    }


def _places(model: nn.Module, layer: nn.Module) -> Places:
    return [(owner, name) for owner in model.modules() for name, child in owner._modules.items() if child is layer]


@torch.no_grad()
def _replace(layer: nn.Linear, places: Places) -> None:
    converted = Float8Linear(layer)
    for owner, name in places:
        setattr(owner, name, converted)
