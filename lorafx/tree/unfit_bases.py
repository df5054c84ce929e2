"""Unfit bases: models that cannot be adapted as they are, because of what another library has done to them."""

from __future__ import annotations

import sys

from torch import nn

from ..errors import AdapterError


def require_no_layers_of_peft(model: nn.Module) -> None:
    """Raise `AdapterError` if PEFT has put layers of its own into a model, which cannot be adapted once more."""
    peft = sys.modules.get("peft")
    if peft is None:
        return
    tuners = sys.modules["peft.tuners.tuners_utils"].BaseTunerLayer
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, tuners)]
    if not found and not isinstance(model, peft.PeftModel):
        return
    path, layer = found[0] if found else ("", model)
    names = ", ".join(map(repr, getattr(layer, "active_adapters", None) or ("none",)))
    raise AdapterError(
        f"the base holds PEFT's layers already: {path or 'the model'} is {type(layer).__module__}."
        f"{type(layer).__name__} (active adapters: {names}). Adapt the model without them: `peft_model.unload()` takes "
        "them out, `peft_model.merge_and_unload()` keeps what they do, and `lorafx.load(base, folder)` loads PEFT's "
        "saved adapter"
    )


def require_tensors_in_place(model: nn.Module) -> None:
    """Raise `AdapterError` for a model whose tensors a library moves about, or would in the first call.

    compressed-tensors does so: what it has packed is made dense then, and all that the model has is put elsewhere.
    """
    for path, module in model.named_modules():
        moved = next((t for t in (module._parameters, module._buffers) if not isinstance(t, dict)), None)
        if moved is not None or getattr(module, "quantization_status", None) == "compressed":
            how = "is packed until the model is first called" if moved is None else f"is in a {type(moved).__name__}"
            raise AdapterError(
                f"{path or 'the model'} ({type(module).__name__}) {how}, as compressed-tensors has it. Load the model "
                "with `quantization_config=CompressedTensorsConfig(dequantize=True)`: it takes no more memory, for the "
                "first call makes the packed weights dense, too"
            )
