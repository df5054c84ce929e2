"""bitsandbytes, 8 bits: `Linear8bitLt` and `Embedding8bit`, a scale for each output feature (LLM.int8(), 2208.07339).

W  ≈  diag(s / 127) Q        Q of int8, s the largest absolute value of each row

With `has_fp16_weights` a layer keeps W and quantises it as it runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import SelectionError
from ..readings import EMBEDDING, LINEAR, Reading
from .own_layer import OwnLayer, is_of

_LARGEST = 127


class Bitsandbytes8bit(OwnLayer):
    """Weights of int8 by rows, or of floats that are quantised in each call."""

    name = "bitsandbytes 8-bit"

    def weights(self, module: nn.Module) -> Iterator[tuple[str, Reading]]:
        if is_of("bitsandbytes.nn", "Linear8bitLt", module):
            yield "weight", LINEAR
        elif is_of("bitsandbytes.nn", "Embedding8bit", module):
            yield "weight", EMBEDDING

    def of(self, module: nn.Module, path: str = "") -> Bitsandbytes8bit:
        if module.weight.dtype != torch.int8 and not _keeps_floats(module):
            raise SelectionError(
                f"{path or type(module).__name__}: its weight has not been quantised to 8 bits yet, which bitsandbytes "
                "does when the model is moved to a device; call `model.to(device)` first (also for the CPU)"
            )
        return self

    def dtype(self, module: nn.Module, parameter: str) -> torch.dtype:
        """Of an embedding what it gives; else, where no floats are kept, torch's default: so PEFT has its adapters."""
        own = getattr(module, "dtype", None)
        if isinstance(own, torch.dtype):
            return own
        if _keeps_floats(module):
            return module.weight.dtype  # type: ignore[return-value]
        return torch.get_default_dtype()

    def stored(self, module: nn.Module, parameter: str) -> dict[str, Tensor]:
        weight: Any = module.weight
        if _keeps_floats(module):
            return {"weight": weight.data}
        scale = weight.SCB if weight.SCB is not None else module.state.SCB  # type: ignore[union-attr]
        return {"weight": weight.data, "scale": scale}

    def has_factor(self, module: nn.Module) -> bool:
        return is_of("bitsandbytes.nn", "Linear8bitLt", module) and not _keeps_floats(module)

    def factor(self, module: nn.Module, dtype: torch.dtype) -> Tensor:
        """As bitsandbytes makes it in backward, whatever forward did with the activations."""
        stored = self.stored(module, "weight")
        return stored["weight"].to(dtype).mul_((stored["scale"] / _LARGEST).unsqueeze(1))

    def dense(self, stored: Mapping[str, Tensor]) -> Tensor:
        if "scale" not in stored:
            return stored["weight"]
        return stored["weight"].float() * (stored["scale"].float() / _LARGEST).unsqueeze(1)

    def packed(self, dense: Tensor, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if "scale" not in stored:
            return {"weight": dense.to(stored["weight"].dtype)}
        scale = dense.abs().amax(1).to(stored["scale"].dtype)
        rows = dense * (_LARGEST / scale.double().clamp(min=torch.finfo(torch.float32).tiny)).unsqueeze(1)
        return {"weight": rows.round().to(torch.int8), "scale": scale}

    def written(self, module: nn.Module) -> None:
        """A layer that keeps floats remembers what it made of them."""
        if _keeps_floats(module) and hasattr(module, "state"):
            module.state.CB = module.state.SCB = None  # type: ignore[union-attr]


def _keeps_floats(module: nn.Module) -> bool:
    state: Any = getattr(module, "state", None)
    return state is not None and state.has_fp16_weights
