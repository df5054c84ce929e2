"""own_weight: the dense weight of a layer that only its own code can read, for kinds that compute with it.

    W = dense(module)        (out, in), in float32

It has no derivative: such weights are frozen. A compiler does not look into it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import AdapterError
from ..tree.own_layers import layer_of, own_forward_of
from .library import LIBRARY, composite


def own_weight(x: Tensor, number: Tensor, shape: Sequence[int]) -> Tensor:
    """The weight of the own layer of this number, in float32, of this shape and where x is.

    Raises `AdapterError` for a layer whose weight is of another shape by now.
    """
    return torch.ops.lorafx.hidden_weight(x.detach(), number, shape)


def _read(x: Tensor, number: Tensor, shape: Sequence[int]) -> Tensor:
    module = layer_of(number)
    forward = own_forward_of(module)
    assert forward is not None, "only own layers have numbers"
    weight = forward.dense(module, forward.parameter).detach()
    if tuple(weight.shape) != tuple(shape):
        raise AdapterError(f"{type(module).__name__} has a weight of {tuple(weight.shape)}, which was {tuple(shape)}")
    return weight.to(x.device, torch.float32, copy=True)


def _shape(x: Tensor, number: Tensor, shape: Sequence[int]) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


LIBRARY.define("hidden_weight(Tensor x, Tensor number, int[] shape) -> Tensor")
LIBRARY.impl("hidden_weight", _read, "CompositeExplicitAutograd")
torch.library.register_fake("lorafx::hidden_weight", _shape, lib=LIBRARY)
composite("own_weight(Tensor x, Tensor number, int[] shape) -> Tensor", own_weight)
