"""How transformers reads a checkpoint: which of its tensors become which of a model's, and back.

`from_pretrained` renames tensors and converts some (experts into one tensor, one projection into three), by rules that
transformers keeps for its own loading; `save_pretrained` does the reverse. Without the functions that are used here,
what a checkpoint's keys mean could be told only of keys that are the model's own names.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN, get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)


class Conversion:
    """Tensors of a checkpoint that become tensors of the model together, by more than a new name.

    `patterns` has the keys, each with the rule's pattern that it fits.
    """

    def __init__(self, loading: Loading, name: str, converter: WeightConverter, patterns: Mapping[str, str]):
        self.loading, self.name, self.converter, self.patterns = loading, name, converter, patterns

    def loaded(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's tensors, by name, from the checkpoint's, by key."""
        converter, model = copy.deepcopy(self.converter), self.loading.model
        for key, pattern in self.patterns.items():
            converter.add_tensor(self.name, key, pattern, stored[key])  # type: ignore[arg-type]
        made: Mapping[str, Any] = converter.convert(self.name, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def stored(self, loaded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The checkpoint's tensors, by key, from the model's: the reverse of `loaded`."""
        return self.loading.stored(loaded, self.patterns)


class Loading:
    """What `from_pretrained` makes of a checkpoint with these keys, for a model on the meta device.

    `names` maps a key to the name of the tensor of the model that it is; `conversions` are for the other keys. Keys
    that are in neither are none of the model's, and not loaded.
    """

    def __init__(self, model: PreTrainedModel, keys: Iterable[str]):
        self.model: Any = model
        self.rules = get_model_conversion_mapping(model)
        self.own = model.state_dict()
        found: dict[str, dict[str, str | None]] = {}
        for key in sorted(keys, key=dot_natural_key):
            name, pattern = self._name(key)
            if name in self.own:
                found.setdefault(name, {})[key] = pattern
        # Of two keys for one tensor the first counts.
        firsts = {name: next(iter(patterns)) for name, patterns in found.items()}
        self.names = {key: name for name, key in firsts.items() if found[name][key] is None}
        converters = {pattern: rule for rule in self._converters for pattern in rule.source_patterns}
        self.conversions = [
            Conversion(self, name, converters[patterns[firsts[name]]], patterns)  # type: ignore[index,arg-type]
            for name, patterns in found.items()
            if patterns[firsts[name]] is not None
        ]

    @property
    def _converters(self) -> list[WeightConverter]:
        return [rule for rule in self.rules if isinstance(rule, WeightConverter)]

    def _name(self, key: str) -> tuple[str, str | None]:
        """The tensor that a key is, or is a part of, and the pattern of the rule that converts it, if one does."""
        renamings = [rule for rule in self.rules if isinstance(rule, WeightRenaming)]
        prefix = self.model.base_model_prefix
        name, pattern = rename_source_key(key, renamings, self._converters, prefix, self.own)
        if name not in self.own and key in self.own:
            return rename_source_key(key, [], [], prefix, self.own)
        return name, pattern

    def stored(self, loaded: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of the model as a checkpoint has them, by key: those of `keys`, or keys of its own making.

        The model's prefix is there or not as it is in `keys`, for it is added and taken off without a rule.
        """
        self.model._weight_conversions = [rule for rule in self.rules if rule.was_used()]
        known, prefix = set(keys), f"{self.model.base_model_prefix}."
        made = {}
        for key, tensor in revert_weight_conversion(self.model, dict(loaded)).items():
            ways = (key, prefix + key, key.removeprefix(prefix))
            made[next((way for way in ways if way in known), key)] = tensor
        return made

    def key_of(self, name: str) -> str | None:
        """A key for a tensor that the checkpoint lacks; None if no single key is read as it."""
        keys = [*self.stored({name: torch.empty(0, device="meta")}, ())] if not self._is_converted(name) else []
        return keys[0] if len(keys) == 1 and self._name(keys[0]) == (name, None) else None

    def _is_converted(self, name: str) -> bool:
        return any(rule.reverse_transform().rename_source_key(name)[1] is not None for rule in self._converters)


def kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], bool]:
    """Says of a name whether transformers keeps that tensor in float32 in a model that is loaded in `dtype`."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return lambda name: False
    pattern, *_ = build_glob_alternation(list(plan))
    return lambda name: pattern.search(name) is not None


def family(model_type: str) -> str:
    """The type of model that others are read like: that of Mixtral for MiniMax, and for itself."""
    return "mixtral" if model_type == "mixtral" else _MODEL_TO_CONVERSION_PATTERN.get(model_type, "")
