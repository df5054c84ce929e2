"""bitsandbytes, 4 bits: `Linear4bit` and `Embedding4bit`, in NF4 or FP4, with absmax quantised again or not.

W  ≈  code[Q] · absmax        for each block of, say, 64 numbers        (QLoRA: Dettmers et al., arXiv 2305.14314)

On a CPU that multiplies bfloat16 in AVX-512, bitsandbytes packs Q in another way when a layer first runs in evaluation.
It rounds absmax to bfloat16 then, computes without gradients, and does not find the way back where absmax is not
quantised again. Adapted layers are kept from that, and where it has happened to a base it is undone, but the rounding.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import SelectionError
from ..readings import EMBEDDING, LINEAR, Reading
from .own_layer import OwnLayer, is_of


class Bitsandbytes4bit(OwnLayer):
    """Packed weights with a `quant_state`. Merging quantises anew, absmax too, in the blocks there are."""

    name = "bitsandbytes 4-bit"

    def weights(self, module: nn.Module) -> Iterator[tuple[str, Reading]]:
        if is_of("bitsandbytes.nn", "Linear4bit", module):
            yield "weight", LINEAR
        elif is_of("bitsandbytes.nn", "Embedding4bit", module):
            yield "weight", EMBEDDING

    def of(self, module: nn.Module, path: str = "") -> Bitsandbytes4bit:
        self.prepare(module)
        state = _state_of(module)
        if state is None:
            raise SelectionError(
                f"{path or type(module).__name__}: its weight has not been quantised to 4 bits yet, which bitsandbytes "
                "does when the model is moved to a device; call `model.to(device)` first (also for the CPU)"
            )
        storage = Bitsandbytes4bit()
        vars(storage).update(
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dense_shape=tuple(state.shape),
            kept_as=module.weight.dtype,
        )
        return storage

    def shape(self, module: nn.Module, parameter: str) -> tuple[int, ...]:
        return tuple(_state_of(module).shape)

    def dtype(self, module: nn.Module, parameter: str) -> torch.dtype:
        """Of an embedding what it gives; else, as in PEFT, that in which the layer computes, or torch's default.

        bitsandbytes leaves open in what a layer computes until its first call, unless somebody has said it.
        """
        own = (getattr(module, name, None) for name in ("dtype", "compute_dtype"))
        return next((each for each in own if isinstance(each, torch.dtype)), torch.get_default_dtype())

    def stored(self, module: nn.Module, parameter: str) -> dict[str, Tensor]:
        self.prepare(module)
        state = _state_of(module)
        found = {"weight": module.weight.data, "absmax": state.absmax}
        return found | ({"of_absmax": state.state2.absmax, "offset": state.offset} if state.nested else {})

    def prepare(self, module: nn.Module) -> None:
        module.__dict__["support_avx512bf16_for_cpu"] = False
        if getattr(_state_of(module), "packing_format_for_cpu", False):
            with _UNPACKING:
                if getattr(_state_of(module), "packing_format_for_cpu", False):
                    _unpack(module.weight)

    def has_factor(self, module: nn.Module) -> bool:
        return is_of("bitsandbytes.nn", "Linear4bit", module)

    def factor(self, module: nn.Module, dtype: torch.dtype) -> Tensor:
        """W as bitsandbytes has it in backward: rounded to the dtype of the full weight, and in that of the product.

        That would be two dense copies, so the rounding is done in place, some rows at a time.
        """
        from bitsandbytes import functional

        self.prepare(module)
        state = copy.copy(_state_of(module))
        full, state.dtype = state.dtype, getattr(module, "compute_dtype", None) or dtype
        packed: Any = module.weight.data
        weight = functional.dequantize_4bit(packed, state)
        for rows in weight.split(_ROWS_ROUNDED) if torch.finfo(full).eps > torch.finfo(weight.dtype).eps else ():
            rows.copy_(rows.to(full))
        return weight

    def dense(self, stored: Mapping[str, Tensor]) -> Tensor:
        """In float32."""
        from bitsandbytes import functional

        absmax = stored["absmax"]
        if "of_absmax" in stored:
            inner = functional.QuantState(
                stored["of_absmax"], code=_dynamic_code(absmax.device), blocksize=256, dtype=torch.float32
            )
            absmax = functional.dequantize_blockwise(absmax, inner) + stored["offset"]
        options: Any = vars(self)
        state = functional.QuantState(
            absmax.float(),
            torch.Size(options["dense_shape"]),
            blocksize=options["blocksize"],
            quant_type=options["quant_type"],
            dtype=torch.float32,
        )
        return functional.dequantize_4bit(stored["weight"], state)

    def packed(self, dense: Tensor, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from bitsandbytes import functional

        options: Any = vars(self)
        weight, state = functional.quantize_4bit(
            dense.float().contiguous(),
            blocksize=options["blocksize"],
            compress_statistics="of_absmax" in stored,
            quant_type=options["quant_type"],
            quant_storage=options["kept_as"],
        )
        found = {"weight": weight.view(stored["weight"].shape), "absmax": state.absmax}
        return found | ({"of_absmax": state.state2.absmax, "offset": state.offset} if state.nested else {})


def _state_of(module: nn.Module) -> Any:
    """The weight's `quant_state`; FSDP and `.data` lose it, and the module has it still."""
    return getattr(module.weight, "quant_state", None) or getattr(module, "quant_state", None)


def _dynamic_code(device: torch.device) -> Tensor:
    """The 256 numbers that absmax is quantised to."""
    from bitsandbytes import functional

    return functional.create_dynamic_map().to(device)


_ROWS_ROUNDED = 256  # at a time
_UNPACKING = threading.Lock()
_ROWS = 32  # are packed together for the CPU


def _unpack(weight: Any) -> None:
    """Give a weight that was packed for the CPU its usual form, with absmax as it was rounded, not quantised again.

    Its bytes then hold the codes of 32 rows by turns; usually each holds those of two columns of one row.
    """
    state = weight.quant_state
    rows, columns = state.shape
    pairs = weight.data.reshape(-1, _ROWS)
    codes = torch.cat([pairs & 15, pairs >> 4], -1).reshape(rows // _ROWS, columns // 2, _ROWS, 2)
    codes = codes.transpose(1, 2).reshape(-1, 2)
    packed = (codes[:, 0] << 4 | codes[:, 1]).reshape(state.original_qshape)
    weight.data = packed.view(getattr(state, "original_storage_type", None) or packed.dtype)
    state.absmax, state.dtype = state.absmax.t().reshape(-1).float(), state.original_dtype
    state.nested, state.offset, state.state2, state.packing_format_for_cpu = False, None, None, False
