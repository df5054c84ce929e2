"""float8: a linear layer's weight as numbers of 8 bits, with a scale for each output feature.

W  ≈  diag(s) Q        Q of float8_e4m3fn, s of float32, powers of two      (`lorafx/ops/float8.py`)

As it comes, W is made dense in each call and multiplied in the dtype of x: right, and slow. The pass
`multiply_in_float8` writes products of float8 instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...ops.float8 import packed
from ..readings import LINEAR, Reading
from .storage import Storage

_from_float8 = torch.ops.lorafx.from_float8


class Float8Linear(nn.Module):
    """(…, in) -> (…, out): a linear layer with `weight` Q (out, in), `scale` s (out,) and `bias` (out,) or None.

    Weight and scale get no gradient, and stay what they are when a module is cast (`.to(dtype)`). `dtype` is that of
    the layer it was made of; it computes in the dtype of x. Its `state_dict` is that of such a layer: a dense weight,
    which loads into either, and here is stored as it was.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.dtype, self.training = linear.weight.dtype, linear.training
        weight, scale = packed(linear.weight.detach())
        self.weight, self.scale = (nn.Parameter(tensor, requires_grad=False) for tensor in (weight, scale))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _from_float8(self.weight, self.scale, x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float8Linear:
        """Move or cast as nn.Module does, with weight and scale as integers, which no cast changes."""
        integers = {id(self.weight): torch.uint8, id(self.scale): torch.int32}

        def kept(tensor: Tensor) -> Tensor:
            integer = integers.get(id(tensor))
            return fn(tensor) if integer is None else fn(tensor.view(integer)).view(tensor.dtype)

        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return super()._apply(kept, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}scale"]
        destination[f"{prefix}weight"] = _from_float8(self.weight, self.scale, self.dtype).detach()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        dense = state_dict.get(f"{prefix}weight")
        if isinstance(dense, Tensor) and dense.shape == self.weight.shape:
            weight, scale = packed(dense)
            state_dict = {**state_dict, f"{prefix}weight": weight, f"{prefix}scale": scale}
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Float8(Storage):
    """The weights of `Float8Linear`."""

    name = "float8"
    lossy = True

    def weights(self, module: nn.Module) -> Iterator[tuple[str, Reading]]:
        if isinstance(module, Float8Linear):
            yield "weight", LINEAR

    def stored(self, module: nn.Module, parameter: str) -> dict[str, Tensor]:
        return {"weight": module.get_parameter(parameter), "scale": module.get_parameter("scale")}

    def dtype(self, module: nn.Module, parameter: str) -> torch.dtype:
        assert isinstance(module, Float8Linear)
        return module.dtype

    @staticmethod
    def expression(weight: Any, scale: Any, dtype: Any) -> Any:  # type: ignore[override]
        return _from_float8.default(weight, scale, dtype)

    def dense(self, stored: Mapping[str, Tensor]) -> Tensor:
        """In float32, which holds it exactly, as most often the layer's dtype does too."""
        return _from_float8(stored["weight"], stored["scale"], torch.float32)

    def packed(self, dense: Tensor, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weight, scale = packed(dense)
        return {"weight": weight, "scale": scale}


FLOAT8 = Float8()
