"""Dense layers in the place of quantised ones: what these stand for, with adapters in it, rounded once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.readings import Reading
from ..adapters.storages import Storage, weights_of
from ..errors import MergeError
from .source import Source

# What transformers notes on a model that it has quantised, besides its config.
_NOTES = ("hf_quantizer", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method")


def require_readable(root: nn.Module) -> None:
    """Raise `MergeError` for a model with a layer whose weight only the layer itself can read."""
    for path, _, _, _, storage in _quantised(root):
        if not storage.readable:
            raise MergeError(
                f"{path} is stored as {storage}: only the module itself can read such a weight, so there is no dense "
                "model; merge into the original checkpoint instead (`lorafx.merge`)"
            )


def dense_layers(root: nn.Module, adapters: Sequence[Adapter], dtype: torch.dtype) -> Iterator[tuple[str, nn.Module]]:
    """For each quantised layer of a tree its path and a dense one in `dtype`, with these adapters in it, in order."""
    sites = [(adapter, site) for adapter in adapters for site in adapter.selection]
    for path, module, parameter, reading, storage in _quantised(root):
        here = [Source.of(root, adapter, site) for adapter, site in sites if site.module == path]
        dense = storage.dense(storage.stored(module, parameter)).double()
        weight, bias = _merged("weight", dense, here), module._parameters.get("bias")
        layer = _layer(module, reading, weight.shape, dtype, bias is not None)
        with torch.no_grad():
            layer.weight.copy_(weight)  # type: ignore[operator, union-attr]
            if bias is not None:
                layer.bias.copy_(_merged("bias", bias.double(), here))  # type: ignore[operator, union-attr]
        yield path, layer.train(module.training)


def forget_quantisation(model: nn.Module) -> None:
    """Take from a model what says that transformers has quantised it: it is saved and loaded as any other then."""
    for name in _NOTES:
        vars(model).pop(name, None)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "quantization_config"):
        del config.quantization_config


def _quantised(root: nn.Module) -> Iterator[tuple[str, nn.Module, str, Reading, Storage]]:
    for path, module in root.named_modules():
        for parameter, reading, storage in weights_of(module):
            if storage.whole:
                yield path, module, parameter, reading, storage.of(module, path)


def _merged(role: str, tensor: Tensor, sources: Sequence[Source]) -> Tensor:
    for source in sources:
        if role in source.adapter.kind.changes(source.site, source.adapter.config):
            tensor = source.merged(role, tensor)
    return tensor


def _layer(module: nn.Module, reading: Reading, shape: torch.Size, dtype: torch.dtype, bias: bool) -> nn.Module:
    device = next(tensor.device for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
    if reading.lookup:
        rows, features = shape
        return nn.Embedding(rows, features, getattr(module, "padding_idx", None), device=device, dtype=dtype)
    outputs, inputs = shape
    return nn.Linear(inputs, outputs, bias, device, dtype)
