"""Replication: a model of which several layers have the weights of one (`layer_replication`), beside the model.

Ranges of layers, as [(0, 4), (2, 5)], say which layers the model has instead of its own, by their numbers. It is a
mirror, so the model itself keeps its layers. The first layer that is made of another has the parameters of that, as any
mirror; each further one has parameters of its own in the same memory, so that every layer has adapters of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..errors import ConfigError
from .mirror import mirrored
from .watched import PLAIN_TENSORS
from .wrappers import unwrapped

REPLICATED = "_lorafx_replicated"  # of the root of such a model, the ranges
Ranges = tuple[tuple[int, int], ...]
_NUMBERS = ("layer_idx", "layer_id")  # what a layer, and modules in it, call its number, which is its place in a cache


class Replicas:
    """The parameters of layers that lie in the memory of another's."""

    def __init__(self) -> None:
        self._pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []  # of two modules' parameters, the source's last

    def add(self, layer: nn.Module, source: nn.Module) -> None:
        """Give a layer, a mirror of its source, parameters of its own in the source's memory."""
        for own, its in zip(layer.modules(), source.modules()):
            own.__dict__["_parameters"] = {
                name: None if p is None else _beside(p) for name, p in its._parameters.items()
            }
            if its._parameters:
                self._pairs.append((own._parameters, its._parameters))

    @property
    def numbers(self) -> set[int]:
        """The parameters, by identity."""
        return {id(parameter) for own, _ in self._pairs for parameter in own.values()}

    def follow(self) -> None:
        """Have them follow the source's, where these have been moved, cast or replaced since."""
        for own, its in self._pairs:
            for name, parameter in its.items():
                if type(parameter) is nn.Parameter and _is_elsewhere(own.get(name), parameter):
                    own[name] = _beside(parameter)


def replicated(model: nn.Module, ranges: Ranges) -> tuple[nn.Module, Replicas]:
    """A mirror of the model with these layers.

    Raises `ConfigError` where PEFT finds no layers, or they are not the model's own, or not to be had twice.
    """
    root, replicas = mirrored(model), Replicas()
    if found := layers_of_others(root):
        raise ConfigError(f"`layer_replication` is {_shown(ranges)}, and the model was made with {_shown(found)}")
    decoder, holder, name = _layers_of(root)
    layers = getattr(holder, name)
    _require_ranges(ranges, layers)
    _require_apart(decoder)
    numbers = [number for start, end in ranges for number in range(start, end)]
    sources, made = list(layers), list[nn.Module]()
    for number in numbers:
        is_first = not any(layer is sources[number] for layer in made)
        made.append(sources[number] if is_first else mirrored(sources[number]))
        if not is_first:
            replicas.add(made[-1], sources[number])
    for number, layer in enumerate(made):
        for module in layer.modules():
            vars(module).update({name: number for name in _NUMBERS if name in vars(module)})
    layers.__dict__["_modules"] = {str(number): layer for number, layer in enumerate(made)}
    _give_config(root, decoder, numbers, len(sources))
    vars(root)[REPLICATED] = ranges
    return root, replicas


def layers_of_others(model: nn.Module) -> Ranges:
    """The ranges that a model's layers were made by; none if it has its own."""
    return vars(unwrapped(model)).get(REPLICATED, ())


def _shown(ranges: Ranges) -> list[list[int]]:
    return [list(pair) for pair in ranges]


def _layers_of(root: nn.Module) -> tuple[nn.Module, nn.Module, str]:
    """The module that has the layers' config, the one that has the list of layers, and its name, as PEFT finds them."""
    decoder = root
    while isinstance(inner := getattr(decoder, "model", None), nn.Module):
        decoder = inner
    decoder = getattr(decoder, "bert", decoder)
    for holder, name in ((decoder, "layers"), (getattr(decoder, "encoder", None), "layer"), (decoder, "h")):
        if isinstance(getattr(holder, name, None), nn.ModuleList):
            assert holder is not None
            return decoder, holder, name
    raise ConfigError(
        f"`layer_replication` needs a list of layers called `layers`, `encoder.layer` or `h`, as PEFT does, and "
        f"{type(decoder).__name__} has none"
    )


def _require_ranges(ranges: Ranges, layers: nn.ModuleList) -> None:
    for start, end in ranges:
        if not 0 <= start < end <= len(layers):
            raise ConfigError(f"`layer_replication` has [{start}, {end}], and the model has {len(layers)} layers")
    packed = [name for name, parameter in layers.named_parameters() if type(parameter) not in PLAIN_TENSORS]
    if packed:
        raise ConfigError(f"`layer_replication` is for weights that are plain parameters, which {packed[0]} is not")


def _require_apart(decoder: nn.Module) -> None:
    """Raise `ConfigError` for layers that are not by themselves, as the config says."""
    config: Any = vars(decoder).get("config")
    reuses = any(mode is not None and mode.startswith("reuse") for mode in getattr(config, "kv_sharing_modes", ()))
    if reuses or getattr(config, "hidden_size_per_layer_input", None):
        what = "keys and values of others" if reuses else "inputs of which there are as many as layers"
        raise ConfigError(
            f"`layer_replication` is for layers by themselves, and {type(decoder).__name__}'s read {what}"
        )


def _give_config(root: nn.Module, decoder: nn.Module, numbers: Sequence[int], count: int) -> None:
    """Give the mirror configs of its own, where the decoder's has the number of layers and what it says of each.

    Such lists have `layer` in their name, as `layer_types` has, and as many entries as there are layers (`count`).
    """
    memo: dict[int, Any] = {}
    for module in (root, decoder):
        if (config := vars(module).get("config")) is not None:
            copy.deepcopy(config, memo)
    own = memo.get(id(vars(decoder).get("config")))
    if own is not None and hasattr(own, "num_hidden_layers"):
        for name, of_each in list(vars(own).items()):
            if "layer" in name and isinstance(of_each, (list, tuple)) and len(of_each) == count:
                setattr(own, name, type(of_each)(of_each[number] for number in numbers))
        own.num_hidden_layers = len(numbers)
    for module in root.modules():
        if id(vars(module).get("config")) in memo:
            vars(module)["config"] = memo[id(vars(module)["config"])]


def _beside(parameter: nn.Parameter) -> nn.Parameter:
    """Another parameter in the same memory."""
    return nn.Parameter(parameter.detach(), parameter.requires_grad)


def _is_elsewhere(own: Any, parameter: nn.Parameter) -> bool:
    if type(own) is not nn.Parameter:  # sharded since, say, each by itself
        return False
    same = own.data_ptr() == parameter.data_ptr() and own.dtype == parameter.dtype
    return not same or own.device != parameter.device
