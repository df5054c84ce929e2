"""torchao: linear layers and embeddings whose weight is one of torchao's tensors, of int8, int4, float8 or other kinds.

W  ≈  s · Q        a scale s for each block of numbers, most often a row

Such a tensor takes part in torch's operators by itself, each kind in a way of its own, so the layer runs as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import MergeError
from ...torch_private.tensors import is_wrapped
from ..readings import EMBEDDING, LINEAR, Reading
from .own_layer import OwnLayer

_INSTEAD = "merge into the original checkpoint instead (`lorafx.merge`), and quantise the result"


class TorchAO(OwnLayer):
    """One of torchao's tensors as the weight of `nn.Linear` or `nn.Embedding`.

    Those that are symmetric, one number of 8 bits each, can be merged into: with new scales, in the blocks there are.
    """

    name = "torchao"

    def weights(self, module: nn.Module) -> Iterator[tuple[str, Reading]]:
        weight = module._parameters.get("weight")
        if weight is None or is_wrapped(weight):  # of a torch.func transform, which shows nobody what is inside
            return
        if type(weight.data).__module__.startswith("torchao."):
            if isinstance(module, nn.Linear):
                yield "weight", LINEAR
            elif isinstance(module, nn.Embedding):
                yield "weight", EMBEDDING

    def of(self, module: nn.Module, path: str = "") -> TorchAO:
        weight: Any = module.weight
        storage = TorchAO()
        vars(storage).update(
            kind=type(weight),
            options=weight.__tensor_flatten__()[1],
            layout=(weight.shape, weight.stride()),
            largest=_largest(weight),
        )
        return storage

    def stored(self, module: nn.Module, parameter: str) -> dict[str, Tensor]:
        weight: Any = module._parameters[parameter].data  # type: ignore[union-attr]
        found = {name: getattr(weight, name) for name in weight.__tensor_flatten__()[0]}
        return {"weight" if name == "qdata" else name: tensor for name, tensor in found.items()}

    def dense(self, stored: Mapping[str, Tensor]) -> Tensor:
        """In float32."""
        own: Any = vars(self)
        inner = {"qdata" if name == "weight" else name: tensor for name, tensor in stored.items()}
        weight = own["kind"].__tensor_unflatten__(inner, own["options"], *own["layout"])
        try:
            return weight.dequantize().float()
        except NotImplementedError as error:
            raise MergeError(f"{own['kind'].__name__} of torchao cannot be made dense; {_INSTEAD}") from error

    def packed(self, dense: Tensor, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own: Any = vars(self)
        codes, scale, zero = stored["weight"], stored.get("scale"), stored.get("zero_point")
        if own["largest"] is None or scale is None or (zero is not None and zero.any()):
            raise MergeError(f"{own['kind'].__name__} of torchao cannot be merged into; {_INSTEAD}")
        rows, columns = (full // size for full, size in zip(dense.shape, own["options"]["block_size"]))
        blocks = dense.reshape(rows, dense.shape[0] // rows, columns, dense.shape[1] // columns)
        scales = (blocks.abs().amax((1, 3), keepdim=True) / own["largest"]).to(scale.dtype)
        found = blocks / scales.clamp(min=torch.finfo(scales.dtype).tiny)
        found = found if codes.is_floating_point() else found.round()
        return {"weight": found.reshape(dense.shape).to(codes.dtype), "scale": scales.reshape(scale.shape)}


def _largest(weight: Any) -> float | None:
    """The largest number that a code stands for; None where codes are packed or not known."""
    codes = getattr(weight, "qdata", None)
    if codes is None or codes.shape != weight.shape:
        return None
    if codes.is_floating_point():
        return torch.finfo(codes.dtype).max
    bits = str(getattr(weight, "target_dtype", codes.dtype)).removeprefix("torch.int")
    return 2 ** (int(bits) - 1) - 1 if bits.isdigit() else None
