"""LoraConfig: PEFT's field names and defaults, frozen and validated."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError

Names = str | Sequence[str] | None


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What to adapt and how: the fields of `peft.LoraConfig`, with its names and defaults.

    Lists are kept as tuples. Fields that lorafx does not implement yet are accepted, so that any PEFT config can be
    read and written back, and refused by `compile` when they ask for something. `extra` holds fields that neither
    knows; they are written back unchanged.

    Raises `ConfigError` for a value of the wrong type or range, naming the field.
    """

    # what
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    bias: str = "none"
    lora_bias: bool = False
    init_lora_weights: bool | str = True
    # where
    target_modules: Names = None
    exclude_modules: Names = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: Names = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    modules_to_save: Sequence[str] | None = None
    # about the file
    peft_type: str = "LORA"
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    auto_mapping: Mapping[str, Any] | None = None
    peft_version: str | None = None
    # not implemented yet: what asks for one of them is refused by `unsupported`
    megatron_config: Any = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: Any = None
    loftq_config: Any = field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: Any = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: Any = None
    target_parameters: Any = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False
    # neither PEFT's nor ours
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple, set, frozenset)):
                object.__setattr__(self, name, tuple(sorted(value) if isinstance(value, (set, frozenset)) else value))
        for check in _CHECKS:
            check(self)

    @property
    def unsupported(self) -> dict[str, Any]:
        """The fields that ask for something lorafx does not implement yet, with their values."""
        asked = {
            name: value  # PEFT writes an empty list, too, for what was not asked for
            for name in NOT_YET
            if (value := getattr(self, name)) != _defaults()[name] and value not in ([], {}, ())
        }
        if not isinstance(self.init_lora_weights, bool) and self.init_lora_weights != "gaussian":
            asked["init_lora_weights"] = self.init_lora_weights
        return asked

    @property
    def all_linear(self) -> bool:
        """Whether every linear layer but the output head is asked for."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"

    @classmethod
    def of(cls, config: LoraConfig | Mapping[str, Any] | Any) -> LoraConfig:
        """A `LoraConfig` from itself, a mapping of its fields, or a `peft.LoraConfig`."""
        if isinstance(config, LoraConfig):
            return config
        if isinstance(config, Mapping):
            return cls.from_dict(config)
        if hasattr(config, "to_dict") and hasattr(config, "peft_type"):
            return cls.from_dict(config.to_dict())
        raise ConfigError(f"a config is a LoraConfig, a peft config or a dict, not {type(config).__name__}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraConfig:
        """Read PEFT's field names; unknown ones are kept in `extra`, with a warning."""
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        values = {key: value for key, value in values.items() if key not in _NOT_WRITTEN}
        extra = {key: value for key, value in values.items() if key not in known}
        if extra:
            warnings.warn(f"config fields that lorafx does not know are kept but have no effect: {sorted(extra)}")
        given = {key: _plain(value) for key, value in values.items() if key in known}
        return cls(**{key: value for key, value in given.items() if not _means_default(key, value)}, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """PEFT's field names to plain JSON values, `extra` included at the top level."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        lists = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        return {**lists, **self.extra}

    def replace(self, **changes: Any) -> LoraConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


# Known to PEFT, refused by `compile` unless they hold their default.
NOT_YET = (
    "megatron_config",
    "trainable_token_indices",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "use_dora",
    "velora_config",
    "alora_invocation_tokens",
    "use_qalora",
    "monteclora_config",
    "layer_replication",
    "target_parameters",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "ensure_weight_tying",
)
# A runtime switch that PEFT itself never writes to a file.
_NOT_WRITTEN = ("runtime_config",)
_NULL_IS_EMPTY = ("rank_pattern", "alpha_pattern", "loftq_config")


def _defaults() -> dict[str, Any]:
    return {
        f.name: f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        for f in dataclasses.fields(LoraConfig)
    }


def _plain(value: Any) -> Any:
    """Enums to their value, nested dataclasses to dicts, sets to sorted lists: what JSON would hold."""
    if isinstance(value, str) and hasattr(value, "value"):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return value


def _means_default(key: str, value: Any) -> bool:
    return value is None and key in _NULL_IS_EMPTY


def _require(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise ConfigError(f"`{name}` must be {expected}, not {value!r}")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _names(value: Any) -> bool:
    return value is None or isinstance(value, str) or _strings(value)


def _strings(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, str) for item in value)


def _check_numbers(config: LoraConfig) -> None:
    _require(_rank(config.r), "r", config.r, "a positive int")
    _require(_number(config.lora_alpha), "lora_alpha", config.lora_alpha, "a number")
    dropout = config.lora_dropout
    _require(_number(dropout) and 0 <= dropout < 1, "lora_dropout", dropout, "a number in [0, 1)")


def _check_flags(config: LoraConfig) -> None:
    for name in ("use_rslora", "lora_bias", "fan_in_fan_out", "inference_mode", "use_dora", "use_qalora"):
        _require(isinstance(getattr(config, name), bool), name, getattr(config, name), "True or False")
    init = config.init_lora_weights
    _require(isinstance(init, (bool, str)), "init_lora_weights", init, "True, False or a name")
    if config.lora_bias and not isinstance(init, bool):
        raise ConfigError(f"`lora_bias` needs `init_lora_weights` True or False, not {init!r}, as in PEFT")
    _require(config.bias in ("none", "all", "lora_only"), "bias", config.bias, '"none", "all" or "lora_only"')


def _check_names(config: LoraConfig) -> None:
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        value = getattr(config, name)
        _require(_names(value), name, value, "a string, a list of strings or None")
    saved = config.modules_to_save
    _require(saved is None or _strings(saved), "modules_to_save", saved, "a list of strings or None")
    mapping = config.auto_mapping
    _require(mapping is None or isinstance(mapping, Mapping), "auto_mapping", mapping, "a dict or None")
    for name in ("peft_type", "task_type", "base_model_name_or_path", "revision", "peft_version"):
        value = getattr(config, name)
        _require(isinstance(value, str) or (value is None and name != "peft_type"), name, value, "a string")


def _check_layers(config: LoraConfig) -> None:
    layers = config.layers_to_transform
    indices = layers if isinstance(layers, tuple) else () if layers is None else (layers,)
    plain_ints = all(isinstance(i, int) and not isinstance(i, bool) for i in indices)
    _require(plain_ints, "layers_to_transform", layers, "an int, a list of ints or None")
    if indices and isinstance(config.target_modules, str) and not config.all_linear:
        raise ConfigError("`layers_to_transform` needs `target_modules` as a list; a regex can name the layers itself")
    if config.layers_pattern and not indices:
        raise ConfigError("`layers_pattern` says where the layers are; `layers_to_transform` must say which")


def _check_patterns(config: LoraConfig) -> None:
    for name, valid, expected in (
        ("rank_pattern", _rank, "a dict of module names to positive ints"),
        ("alpha_pattern", _number, "a dict of module names to numbers"),
    ):
        value = getattr(config, name)
        fits = isinstance(value, Mapping) and all(isinstance(k, str) and valid(v) for k, v in value.items())
        _require(fits, name, value, expected)


def _check_regexes(config: LoraConfig) -> None:
    whole = [(name, getattr(config, name)) for name in ("target_modules", "exclude_modules")]
    found = [(name, value) for name, value in whole if isinstance(value, str)]
    for name in ("layers_pattern", "modules_to_save", "rank_pattern", "alpha_pattern"):
        value = getattr(config, name) or ()
        found += [(name, each) for each in ((value,) if isinstance(value, str) else value)]
    for name, expression in found:
        try:
            re.compile(expression)
        except re.error as error:
            raise ConfigError(f"`{name}` holds {expression!r}, which is no valid regex: {error}") from error


_CHECKS = (_check_numbers, _check_flags, _check_names, _check_layers, _check_patterns, _check_regexes)
