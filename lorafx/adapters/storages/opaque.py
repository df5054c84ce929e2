"""opaque: a layer of in and out features whose weight nobody else can read, as those of GPTQ, AWQ, HQQ, EETQ, AQLM,
BitNet, quanto and the libraries' layers of float8.

It runs its own forward, with the adapter beside it, and cannot be merged into.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...torch_private.tensors import is_traceable_wrapper_subclass, is_wrapped
from ...tree.attached import own_modules
from ...tree.own_layers import TOKEN, token_of
from ..readings import LINEAR, Reading
from .own_layer import OwnLayer, is_of

# What libraries call the numbers of features of their layers.
_FEATURES = (("in_features", "out_features"), ("infeatures", "outfeatures"), ("input_size", "output_size"))


# Layers whose weight is a dense parameter, which they compute with in a way of their own: of these classes, or those
# that compressed-tensors gives a scheme, by which they round weights and inputs when they run.
_BY_NAME = (("transformers.integrations.bitnet", "AutoBitLinear"),)
_SCHEME = "quantization_scheme"


class Opaque(OwnLayer):
    """Layers with numbers of features, and no weight of so many floats in them or below them.

    Floats of 8 bits do not count, for they need a scale, nor do tensors of a library's own class. Norms may be below.
    """

    name = "opaque"
    readable = False

    def weights(self, module: nn.Module) -> Iterator[tuple[str, Reading]]:
        if not (features := features_of(module)) or any(t.ndim > 1 for m in _below(module) for _, t in _tensors(m)):
            return
        if is_by_name(module) or not any(_is_dense(t, math.prod(features)) for _, t in _tensors(module)):
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
        """As in PEFT, that in which the layer says that it computes, or that of a weight of floats, or torch's default.

        What a library keeps beside a weight, as GPTQ's scales in float16, says nothing of what the model computes in.
        """
        own = getattr(module, "compute_dtype", None)
        if isinstance(own, torch.dtype):
            return own
        weight = module._parameters.get("weight")
        return weight.dtype if weight is not None and _is_wide(weight) else torch.get_default_dtype()


def is_by_name(module: nn.Module) -> bool:
    """Whether a layer is opaque although its weight looks dense."""
    return any(is_of(*name, module) for name in _BY_NAME) or getattr(module, _SCHEME, None) is not None


def is_foreign(tensor: Tensor) -> bool:
    """Whether a tensor is of a class of a library's own, and made of others, as quanto's are; torch's do not count."""
    if is_wrapped(tensor):  # of a torch.func transform
        return False
    return is_traceable_wrapper_subclass(tensor.data) and type(tensor.data).__module__.partition(".")[0] != "torch"


def _is_dense(tensor: Tensor, numbers: int) -> bool:
    return _is_wide(tensor) and tensor.numel() >= numbers and not is_foreign(tensor)


def _is_wide(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() > 1


def features_of(module: nn.Module) -> tuple[int, int] | None:
    """How many features a layer takes and gives, by its attributes; EETQ's have none in transformers."""
    for names in _FEATURES:
        found = [getattr(module, name, None) for name in names]
        if all(isinstance(number, int) for number in found):
            return found[0], found[1]  # type: ignore[return-value]
    if is_of("transformers.integrations.eetq", "EetqLinear", module):
        inputs, outputs = module.get_parameter("weight").shape
        return inputs, outputs
    return None


def _below(module: nn.Module) -> list[nn.Module]:
    """The modules below it, without those that hold adapters."""
    return [inner for inner in own_modules(module) if inner is not module]


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    every = (*module._parameters.items(), *module._buffers.items())
    return [(name, tensor) for name, tensor in every if tensor is not None]
