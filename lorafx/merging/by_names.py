"""A model by the names of its tensors alone, for a checkpoint whose class is code of its own, which is not run.

A weight of two dimensions is a linear layer's, or an embedding's if an adapter says so. That is enough for merging:
PEFT adapts linear layers and embeddings, and no other modules that keep a `weight` of two dimensions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..files.base import BaseFolder
from ..files.checkpoint import Checkpoint
from ..files.shards import Entry

_EMBEDDING = ".lora_embedding_A"  # in the keys of an adapter on an embedding


class ByNames(PreTrainedModel):
    """A tree of modules that has tensors and no forward."""

    def __init__(self) -> None:
        super().__init__(PretrainedConfig())


def by_names(base: BaseFolder, found: Sequence[Checkpoint], dtype: torch.dtype | None) -> ByNames:
    """The tree of a checkpoint's tensors, on the meta device; those of floats are of `dtype`, or torch's default."""
    transposed = any(getattr(each.config, "fan_in_fan_out", False) for each in found)
    lookups = [key.partition(_EMBEDDING)[0] for each in found for key in each.tensors if _EMBEDDING in key]
    tensors: dict[str, dict[str, Entry]] = defaultdict(dict)
    for key, entry in base.entries.items():
        path, _, name = key.rpartition(".")
        tensors[path][name] = entry
    model = ByNames()
    for path in sorted(tensors, key=lambda path: path.count(".")):
        lookup = any(place.endswith(f".{path}") for place in lookups)
        own = _module(tensors[path], lookup, transposed)
        place = _place(model, path) if own is None else _put(model, path, own)
        for name, entry in tensors[path].items():
            place.register_parameter(name, _empty(entry, dtype))
    model.post_init()
    return model


def _module(tensors: dict[str, Entry], lookup: bool, transposed: bool) -> nn.Module | None:
    """The module of a weight of two dimensions; None for other tensors."""
    weight = tensors.get("weight")
    if weight is None or len(weight.shape) != 2:
        return None
    first, second = weight.shape
    with torch.device("meta"):
        if lookup:
            return nn.Embedding(first, second)
        return Conv1D(second, first) if transposed else nn.Linear(second, first, "bias" in tensors)


def _place(model: nn.Module, path: str) -> nn.Module:
    """The module at a path, which is made if it is not there."""
    for name in path.split(".") if path else ():
        if name not in model._modules:
            model.add_module(name, nn.Module())
        model = model._modules[name]  # type: ignore[assignment]
    return model


def _put(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    above, _, name = path.rpartition(".")
    _place(model, above).add_module(name, module)
    return module


def _empty(entry: Entry, dtype: torch.dtype | None) -> nn.Parameter:
    stored = entry.torch_dtype or torch.uint8
    wide = stored.is_floating_point and stored.itemsize > 1
    kept = (dtype or torch.get_default_dtype()) if wide else stored
    return nn.Parameter(torch.empty(entry.shape, dtype=kept, device="meta"), requires_grad=False)
