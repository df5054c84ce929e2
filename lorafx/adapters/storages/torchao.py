"""torchao: linear layers and embeddings whose weight is one of torchao's tensors, of int8, int4, float8 or other kinds.

Such a tensor takes part in torch's operators by itself, each kind in a way of its own, so the layer runs as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import MergeError
from ..readings import EMBEDDING, LINEAR, Reading
from .own_forward import OwnForward


class TorchAO(OwnForward):
    """One of torchao's tensors as the weight of `nn.Linear` or `nn.Embedding`."""

    name = "torchao"

    def weights(self, module: nn.Module) -> Iterator[tuple[str, Reading]]:
        weight = module._parameters.get("weight")
        if weight is not None and type(weight.data).__module__.startswith("torchao."):
            if isinstance(module, nn.Linear):
                yield "weight", LINEAR
            elif isinstance(module, nn.Embedding):
                yield "weight", EMBEDDING

    def dense(self, stored: Mapping[str, Tensor]) -> Tensor:
        return stored["weight"].dequantize()

    def packed(self, dense: Tensor, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise MergeError("torchao")
