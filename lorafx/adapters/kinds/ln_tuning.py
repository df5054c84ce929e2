"""LN tuning (Zhao et al., 2023, arXiv 2312.11420): the norms of a model train, and nothing else.

There is no equation: the adapter has copies of its own of all that these modules have, and graphs read those in place
of the base's. Any module can be trained so; merged for good, the copies take the base's place.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import AdapterConfig
from ..default_targets import LN_TUNING_TARGETS
from .kind import Kind


@dataclass(frozen=True, kw_only=True)
class LNTuningConfig(AdapterConfig):
    """The fields of `peft.LNTuningConfig`, with its names and defaults.

    Raises `ConfigError` for a value of the wrong type or range, naming the field.
    """

    peft_type: str = "LN_TUNING"

    absent = "layers_to_transform", "layers_pattern"
    default_targets = LN_TUNING_TARGETS


class LNTuning(Kind):
    """The LN tuning kind; see the module's docstring."""

    config = LNTuningConfig
    whole = "ln_tuning_layers"
