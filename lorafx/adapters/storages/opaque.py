"""opaque: a layer of in and out features whose weight nobody else can read, as those of GPTQ, AWQ, HQQ, EETQ, AQLM.

It runs its own forward, with the adapter beside it, and cannot be merged into.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...tree.attached import own_modules
from ...tree.own_layers import TOKEN, token_of
from ..readings import LINEAR, Reading
from .own_layer import OwnLayer

# What libraries call the numbers of features of their layers.
_FEATURES = (("in_features", "out_features"), ("infeatures", "outfeatures"), ("input_size", "output_size"))


class Opaque(OwnLayer):
    """Layers with numbers of features, and no weight of so many floats in them or below them."""

    name = "opaque"
    readable = False

    def weights(self, module: nn.Module) -> Iterator[tuple[str, Reading]]:
        if not (features := features_of(module)) or any(map(_tensors, _below(module))):
            return
        if not any(t.is_floating_point() and t.numel() >= math.prod(features) for _, t in _tensors(module)):
            name = next((name for name, _ in _tensors(module) if name != "bias"), TOKEN)
            if name == TOKEN:
                token_of(module)
            yield name, LINEAR

    def is_certain(self, module: nn.Module) -> bool:
        """It may be anything that has numbers of features: only where an adapter wants it is it taken for a layer."""
        return False

    def shape(self, module: nn.Module, parameter: str) -> tuple[int, ...]:
        inputs, outputs = features_of(module) or (0, 0)
        return outputs, inputs

    def dtype(self, module: nn.Module, parameter: str) -> torch.dtype:
        """That of the first tensor of floats, most often scales or the bias."""
        return next((t.dtype for _, t in _tensors(module) if t.is_floating_point()), torch.get_default_dtype())


def features_of(module: nn.Module) -> tuple[int, int] | None:
    """How many features a layer takes and gives, by its attributes."""
    for names in _FEATURES:
        found = [getattr(module, name, None) for name in names]
        if all(isinstance(number, int) for number in found):
            return found[0], found[1]  # type: ignore[return-value]
    return None


def _below(module: nn.Module) -> list[nn.Module]:
    """The modules below it, without those that hold adapters."""
    return [inner for inner in own_modules(module) if inner is not module]


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    every = (*module._parameters.items(), *module._buffers.items())
    return [(name, tensor) for name, tensor in every if tensor is not None]
