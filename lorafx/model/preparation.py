"""Preparation: a quantised base as training wants it, before it is adapted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..adapters.storages import weights_of
from ..errors import AdapterError, ConfigError
from .adapted_model import AdaptedModel

# Methods whose layers compute in 16 bits whatever they are given: such models stay as they are.
_IN_16_BITS = ("gptq", "aqlm", "eetq", "hqq", "torchao")


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Prepare one of transformers' models for training adapters, as PEFT does, and return it. In place.

    Every parameter is frozen. Those of 16 bits that are no quantised weights (norms, embeddings, head, biases) become
    float32, but for a model quantised by GPTQ, AQLM, EETQ, HQQ or torchao. With `use_gradient_checkpointing` a
    quantised model keeps only its layers' inputs for backward, and its embeddings' outputs want gradients unless
    `gradient_checkpointing_kwargs` (torch.utils.checkpoint's arguments) say `use_reentrant=False`; a graph recomputes
    its layers in the one way that needs no such inputs. `auto_clear_cache` gives what the casts have freed back to the
    GPU. Call it before `lorafx.compile`. PEFT's own function does the same.

    Raises `AdapterError` for an adapted model, and `ConfigError` for one that cannot checkpoint its layers, or for
    `gradient_checkpointing_kwargs` that are no mapping; the model is as it was.
    """
    if isinstance(model, AdaptedModel):
        raise AdapterError("the model is adapted already; prepare its base before `lorafx.compile`")
    options = gradient_checkpointing_kwargs
    if not (options is None or isinstance(options, Mapping)):
        raise ConfigError(f"`gradient_checkpointing_kwargs` must be a dict or None, not {options!r}")
    method = _quantised_by(model)
    checkpointing = bool(method) and use_gradient_checkpointing
    if checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(
            f"{type(model).__name__} has no gradient checkpointing; pass use_gradient_checkpointing=False"
        )
    model.requires_grad_(False)
    if method not in _IN_16_BITS:
        _widen(model)
        if auto_clear_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()
    if checkpointing:
        _checkpoint(model, dict(options or {}))
    return model


def _quantised_by(model: nn.Module) -> str | None:
    """The name of what quantised a model for transformers; None if nothing has."""
    method = getattr(model, "quantization_method", None)
    if method is None and getattr(model, "hqq_quantized", False):
        return "hqq"
    if method is None and (getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)):
        return "bitsandbytes"
    return None if method is None else str(getattr(method, "value", method))


def _widen(model: nn.Module) -> None:
    packed = {id(parameter) for parameter in _packed(model)}
    for parameter in model.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16) and id(parameter) not in packed:
            parameter.data = parameter.data.float()


def _packed(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that hold quantised weights: packed numbers may be kept as floats of 16 bits."""
    for module in model.modules():
        for name, _, storage in weights_of(module):
            if storage.lossy and isinstance(parameter := module._parameters.get(name), nn.Parameter):
                yield parameter


def _checkpoint(model: Any, options: dict[str, Any]) -> None:
    if options.get("use_reentrant", True):
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
