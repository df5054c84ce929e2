"""opaque: a layer of in and out features whose weight nobody else can read, as those of GPTQ, AWQ, HQQ, EETQ, AQLM.

It runs its own forward, with the adapter beside it, and cannot be merged into.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ..readings import LINEAR, Reading
from .own_forward import OwnForward

# What libraries call the numbers of features of their layers.
_FEATURES = (("in_features", "out_features"), ("infeatures", "outfeatures"), ("input_size", "output_size"))


class Opaque(OwnForward):
    """Layers with numbers of features and no children, in which no weight can be read by operators."""

    name = "opaque"

    def weights(self, module: nn.Module) -> Iterator[tuple[str, Reading]]:
        if features_of(module) and not module._modules and _is_quantised(module):
            names = [name for name, t in (*module._parameters.items(), *module._buffers.items()) if t is not None]
            yield next((name for name in names if name != "bias"), ""), LINEAR

    def shape(self, module: nn.Module, parameter: str) -> tuple[int, ...]:
        inputs, outputs = features_of(module) or (0, 0)
        return outputs, inputs

    def dtype(self, module: nn.Module, parameter: str) -> torch.dtype:
        """That of the first tensor of floats, most often scales or the bias."""
        tensors = (*module._parameters.values(), *module._buffers.values())
        return next((t.dtype for t in tensors if t is not None and t.is_floating_point()), torch.get_default_dtype())


def features_of(module: nn.Module) -> tuple[int, int] | None:
    """How many features a layer takes and gives, by its attributes."""
    for names in _FEATURES:
        found = [getattr(module, name, None) for name in names]
        if all(isinstance(number, int) for number in found):
            return found[0], found[1]  # type: ignore[return-value]
    return None


def _is_quantised(module: nn.Module) -> bool:
    """Whether it has a matrix, and none of floats in full."""
    matrices = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None and t.ndim > 1]
    inputs, outputs = features_of(module) or (0, 0)
    return not any(t.is_floating_point() and t.numel() >= inputs * outputs for t in matrices)
