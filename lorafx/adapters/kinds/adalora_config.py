"""AdaLoraConfig: the fields of `peft.AdaLoraConfig`, which are LoRA's and those of a schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...errors import ConfigError
from ..config import is_number, require, require_counts, require_naturals
from ..default_targets import ADALORA_TARGETS
from .lora_config import LoraConfig


def _check_schedule(config: AdaLoraConfig) -> None:
    require_counts(config, "init_r", "target_r", "deltaT", "total_step")
    require_naturals(config, "tinit", "tfinal")
    if config.tinit >= config.last_allocation:
        raise ConfigError(
            f"`tinit`={config.tinit} steps before and `tfinal`={config.tfinal} after leave none of `total_step`="
            f"{config.total_step} to allocate ranks in; make one of these smaller, or `total_step` larger"
        )
    for name in ("beta1", "beta2"):
        value = getattr(config, name)
        require(is_number(value) and 0 < value < 1, name, value, "a number between 0 and 1")
    weight = config.orth_reg_weight
    require(is_number(weight) and weight >= 0, "orth_reg_weight", weight, "a number that is not negative")


def _check_pattern(config: AdaLoraConfig) -> None:
    pattern = config.rank_pattern
    fits = pattern is None or (isinstance(pattern, Mapping) and all(_is_mask(each) for each in pattern.values()))
    require(fits, "rank_pattern", pattern, "None, or a list of True and False for each name of a `lora_E`")


def _is_mask(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(each, bool) for each in value)


def _check_of_lora(config: AdaLoraConfig) -> None:
    absent = "use_dora", "loftq_config", "lora_bias", "trainable_token_indices", "target_parameters"
    for name in (*absent, "ensure_weight_tying", "alora_invocation_tokens"):
        if getattr(config, name):
            raise ConfigError(f"AdaLoRA has no `{name}`; leave it out, or use a LoraConfig")
    init = config.init_lora_weights
    require(isinstance(init, bool), "init_lora_weights", init, "True or False for AdaLoRA")


@dataclass(frozen=True, kw_only=True)
class AdaLoraConfig(LoraConfig):
    """What to adapt and how: the fields of `peft.AdaLoraConfig`, with its names and defaults.

    Each site starts with `init_r` directions. After `tinit` steps, every `deltaT` of them, the least important are set
    to zero, fewer than `target_r` a site being left on average `tfinal` steps before `total_step`. `rank_pattern` says
    which directions are left, by the name of each site's `lora_E`; it follows the training, and None is all of them.

    Raises `ConfigError` for a value of the wrong type or range, naming the field.
    """

    peft_type: str = "ADALORA"
    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: Mapping[str, Sequence[bool]] | None = None  # type: ignore[assignment]

    checks = (*LoraConfig.common_checks, _check_schedule, _check_pattern, _check_of_lora)
    null_is_default: ClassVar[tuple[str, ...]] = ("alpha_pattern", "loftq_config")
    default_targets = ADALORA_TARGETS
    takes_parameters = False

    @property
    def last_allocation(self) -> int:
        """The step at which the ranks become final."""
        return (self.total_step or 0) - self.tfinal
