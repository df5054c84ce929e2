"""Configs in a field of `LoraConfig`: what they may hold, with PEFT's defaults. They are kept as dicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...errors import ConfigError
from ..config import is_count, is_number, require

# How start values come out of data.
OF_DATA: dict[str, dict[str, Any]] = {
    "eva_config": {
        "rho": 2.0,
        "tau": 0.99,
        "use_label_mask": True,
        "label_mask_value": -100,
        "whiten": False,
        "adjust_scaling_factors": True,
    },
    "corda_config": {"corda_method": "ipm"},
    "lora_ga_config": {"direction": "ArB2r", "scale": "stable", "stable_gamma": 16},
}
# What a variant of LoRA is like.
OF_VARIANTS: dict[str, dict[str, Any]] = {
    "use_bdlora": {"target_modules_bd_a": None, "target_modules_bd_b": None, "nblocks": 1, "match_strict": True},
    "kasa_config": {"beta": 1e-4, "gamma": 1e-3},
    "monteclora_config": {
        "num_samples": 8,
        "use_entropy": False,
        "dirichlet_prior": 0.1,
        "sample_scaler": 1e-4,
        "kl_loss_weight": 1e-5,
        "buffer_size": 150,
    },
    "velora_config": {"num_groups": 64, "scale": 1.0, "init_type": "batch_average"},
}
_DEFAULTS = OF_DATA | OF_VARIANTS
# Of PEFT's `CordaConfig`: where its function keeps files, and how it goes about it. They say nothing of the values.
CORDA_FILES = ("cache_file", "covariance_file", "verbose", "use_float16_for_covariance")
_NO_VALUES = (*CORDA_FILES, "prune_temporary_fields")
_ONE_OF = {
    "init_type": ("batch_average", "batch_average_once", "random"),
    "corda_method": ("ipm", "kpm"),
    "direction": ("ArBr", "A2rBr", "ArB2r", "random"),
    "scale": ("stable", "weight_svd", "gd_scale", "unit"),
}


def fields_of(value: Any) -> dict[str, Any]:
    """What a config in a field of another says; nothing if it is None."""
    return dict(value) if isinstance(value, Mapping) else {}


def whole(name: str, value: Any) -> dict[str, Any]:
    """All that a config in the field `name` says, with PEFT's defaults."""
    return _DEFAULTS[name] | fields_of(value)


def check_subconfigs(config: Any) -> None:
    """Raise `ConfigError` for what such a config has not, or may not be, naming it."""
    for field, defaults in _DEFAULTS.items():
        given = {key: value for key, value in fields_of(getattr(config, field)).items() if key not in _NO_VALUES}
        if unknown := sorted(map(str, given.keys() - defaults.keys())):
            raise ConfigError(f"`{field}` has no {', '.join(unknown)}; it has {', '.join(defaults)}")
        for key, value in given.items():
            name = f"{field}[{key!r}]"
            if isinstance(defaults[key], str):
                require(value in _ONE_OF[key], name, value, f"one of {', '.join(_ONE_OF[key])}")
            elif key in _HOLDS:
                require(_HOLDS[key][0](value), name, value, _HOLDS[key][1])
            elif isinstance(defaults[key], bool):
                require(isinstance(value, bool), name, value, "True or False")
            else:
                require(is_number(value), name, value, "a number")


def _above_zero(value: Any) -> bool:
    return is_number(value) and value > 0


def _not_negative(value: Any) -> bool:
    return is_number(value) and value >= 0


def _names(value: Any) -> bool:
    return value is None or (isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value))


# What is more than a number or a flag.
_HOLDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "rho": (lambda value: is_number(value) and value >= 1, "a number from 1"),
    "tau": (lambda value: is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    "stable_gamma": (_above_zero, "a number above 0"),
    "target_modules_bd_a": (_names, "a list of strings or None"),
    "target_modules_bd_b": (_names, "a list of strings or None"),
    "nblocks": (is_count, "a positive int"),
    "num_groups": (is_count, "a positive int"),
    "num_samples": (is_count, "a positive int"),
    "dirichlet_prior": (_above_zero, "a number above 0"),
    "buffer_size": (is_count, "a positive int"),
    "beta": (_not_negative, "a number from 0"),
    "gamma": (_not_negative, "a number from 0"),
}
