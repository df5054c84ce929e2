"""Kinds: adapter families, one file each.

A kind is an equation that wraps a base operator, with its tensors, their start values, its config class and the merged
weight. `register` makes one of your own known, under the PEFT type that its config class names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError
from ..config import AdapterConfig, defaults_of
from .kind import SCALING, Kind, Operands, Spec
from .lora import Lora
from .lora_config import LoraConfig

# By PEFT type: the `peft_type` of configs and files.
KINDS: dict[str, Kind] = {}


def register(kind: type[Kind]) -> type[Kind]:
    """Make a kind known, so that its configs and its files are accepted everywhere; returns the class."""
    KINDS[defaults_of(kind.config)["peft_type"]] = kind()
    return kind


def kind_of(peft_type: str) -> Kind:
    """The kind of a PEFT type name; `ConfigError` for one that lorafx does not know."""
    if peft_type not in KINDS:
        raise ConfigError(f"peft_type {peft_type!r} is not implemented; lorafx knows {', '.join(KINDS)}")
    return KINDS[peft_type]


def config_of(config: AdapterConfig | Mapping[str, Any] | Any) -> AdapterConfig:
    """The config as one of its kind's class: from itself, a mapping of its fields, or a `peft` config.

    A mapping without `peft_type` is LoRA's. For a kind that lorafx does not know it is an `AdapterConfig`, with that
    kind's fields in `extra`. Raises `ConfigError` for a field that is wrong, naming it.
    """
    if isinstance(config, AdapterConfig):
        return config
    named = config.get("peft_type", "LORA") if isinstance(config, Mapping) else getattr(config, "peft_type", "LORA")
    known = KINDS.get(getattr(named, "value", named) if isinstance(named, str) else "")
    return (known.config if known else AdapterConfig).of(config)


register(Lora)

__all__ = ["KINDS", "SCALING", "Kind", "LoraConfig", "Operands", "Spec", "config_of", "kind_of", "register"]
