"""Kinds: adapter families, one file each, by the name that PEFT's files give them (`peft_type`)."""

from __future__ import annotations

from ...errors import ConfigError
from .kind import Kind
from .lora import Lora

KINDS: dict[str, Kind] = {kind.peft_type: kind for kind in (Lora(),)}


def kind_of(peft_type: str) -> Kind:
    """The kind of a PEFT type name; `ConfigError` for one that lorafx does not know."""
    if peft_type not in KINDS:
        raise ConfigError(f"peft_type {peft_type!r} is not implemented; lorafx knows {', '.join(KINDS)}")
    return KINDS[peft_type]


__all__ = ["KINDS", "Kind", "Lora", "kind_of"]
