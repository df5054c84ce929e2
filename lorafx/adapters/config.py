"""AdapterConfig: where an adapter goes, in PEFT's field names, frozen and validated. Each kind adds its own fields."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

from ..errors import ConfigError, warn
from .default_targets import DEFAULT_TARGETS
from .peft_itself import refuse_peft_itself

Names = str | Sequence[str] | None
TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The fields that the configs of all adapter families share, with PEFT's names and defaults.

    A family's own config is a frozen dataclass that inherits from this, gives `peft_type` its default, and lists its
    `checks`: functions that raise `ConfigError` for a field that is wrong. Lists are kept as tuples. `extra` holds
    fields of a file that lorafx does not know; they are written back unchanged.

    Attributes:
        target_modules: which modules are adapted: endings of their names, a regex for whole names, "all-linear" for all
            linear layers but the output head, or None for PEFT's choice by the model's type.
        exclude_modules: which are not: endings of names, or a regex for whole names.
        layers_to_transform: the numbers of the layers that are adapted; None for all.
        layers_pattern: what the list of layers is called, as "layers", where it is not one of the usual names.
        modules_to_save: modules that train as a whole, of which the adapter has copies: endings of their names.
        task_type: what the model is for, one of `TASKS`. A classifier's head trains as a whole, as `modules_to_save`
            do; else it is written to the file, and changes nothing here.
        inference_mode: whether the adapter is frozen.
    """

    # where
    target_modules: Names = None
    exclude_modules: Names = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: Names = None
    modules_to_save: Sequence[str] | None = None
    # about the file
    peft_type: str
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    auto_mapping: Mapping[str, Any] | None = None
    peft_version: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    checks: ClassVar[tuple[Callable[[Any], None], ...]] = ()
    # Fields that may be lists or sets, and are kept as tuples.
    tuples: ClassVar[tuple[str, ...]] = (
        *("target_modules", "exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save"),
    )
    # Fields of this class that PEFT's namesake has not, so that they are not written to files, and must be None.
    absent: ClassVar[tuple[str, ...]] = ()
    # `target_modules` that stand for None, by the model's type.
    default_targets: ClassVar[Mapping[str, tuple[str, ...] | str]] = DEFAULT_TARGETS
    # Whether None for `target_modules` means the model's input embedding.
    for_embeddings: ClassVar[bool] = False
    # Whether it can name parameters, by `target_parameters`.
    takes_parameters: ClassVar[bool] = False
    # Fields that are null in some of PEFT's files, which means their default.
    null_is_default: ClassVar[tuple[str, ...]] = ()

    @property
    def options(self) -> dict[str, Any]:
        """What the config says of the adapter, and not of its file or of who trains it."""
        about_the_file = {"task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version"}
        named = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in named.items() if name not in about_the_file}

    @property
    def equation(self) -> dict[str, Any]:
        """What the config says of the equations at its sites: what its family adds to the fields of all."""
        common = {each.name for each in fields(AdapterConfig)}
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in common}

    def __post_init__(self) -> None:
        for each in fields(self):
            if dataclasses.is_dataclass(value := getattr(self, each.name)) and not isinstance(value, type):
                object.__setattr__(self, each.name, dataclasses.asdict(value))  # a config of PEFT's in a field
        for name in self.tuples:
            value = getattr(self, name)
            if isinstance(value, (list, tuple, set, frozenset)):
                object.__setattr__(self, name, tuple(sorted(value) if isinstance(value, (set, frozenset)) else value))
        for check in (_check_names, _check_layers, _check_regexes, _check_absent, *self.checks):
            check(self)

    @property
    def unsupported(self) -> dict[str, Any]:
        """The fields that ask for something lorafx does not implement yet, with their values."""
        return {}

    def with_values(self) -> Self:
        """The config of an adapter that has its values, of a file: how values are found to start from may not count."""
        return self

    @property
    def parameters(self) -> tuple[str, ...]:
        """Parameters to adapt besides `target_modules`, by their names or endings of these."""
        return ()

    @property
    def ties(self) -> bool:
        """Whether adapters and copies of modules whose weight is tied to the input embedding's are tied, too."""
        return False

    @property
    def replicates(self) -> tuple[tuple[int, int], ...]:
        """The layers that the model has instead of its own, as ranges of their numbers; none for its own."""
        return ()

    def besides(self, embedding: str) -> tuple[str, ...]:
        """Modules to adapt besides `target_modules`, by endings of names; `embedding` names the input embedding."""
        return ()

    @property
    def is_prompt_learning(self) -> bool:
        """False: PEFT's configs have this, and code that takes several methods asks for it."""
        refuse_peft_itself("`lorafx.get_peft_model_state_dict` and `lorafx.set_peft_model_state_dict`")
        return False

    @property
    def all_linear(self) -> bool:
        """Whether every linear layer but the output head is asked for."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"

    @classmethod
    def of(cls, config: Self | Mapping[str, Any] | Any) -> Self:
        """A config of this class from itself, a mapping of its fields, or a `peft` config; `ConfigError` if wrong."""
        if isinstance(config, cls):
            return config
        if isinstance(config, Mapping):
            return cls.from_dict(config)
        if hasattr(config, "to_dict") and hasattr(config, "peft_type"):
            return cls.from_dict(config.to_dict())
        raise ConfigError(f"a config is a {cls.__name__}, a peft config or a dict, not {type(config).__name__}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A config from a mapping of PEFT's field names; unknown ones are kept in `extra`, with a warning."""
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        values = {key: value for key, value in values.items() if key not in NOT_WRITTEN}
        extra = {key: _plain(value) for key, value in values.items() if key not in known}
        if extra:
            warn(f"config fields that lorafx does not know are kept but have no effect: {sorted(extra)}")
        given = {key: _plain(value) for key, value in values.items() if key in known}
        nulls = {key for key, value in given.items() if value is None and key in cls.null_is_default}
        return cls(**{key: value for key, value in given.items() if key not in nulls}, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """PEFT's field names to values, tuples as lists; what is in `extra` stands beside the other fields."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("extra", *self.absent)}
        lists = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        return {**lists, **self.extra}

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


# A switch that PEFT's configs have at run time and PEFT never writes to a file.
NOT_WRITTEN = ("runtime_config",)


def defaults_of(config: type[AdapterConfig]) -> dict[str, Any]:
    """The default of each field of a config class."""
    return {
        f.name: f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        for f in dataclasses.fields(config)
    }


def _plain(value: Any) -> Any:
    """A value as JSON can hold it: an enum's value, a nested dataclass as a dict, a set as a sorted list."""
    if isinstance(value, str) and hasattr(value, "value"):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return value


def require(holds: bool, name: str, value: Any, expected: str) -> None:
    """Raise `ConfigError` unless a field holds what is expected of it."""
    if not holds:
        raise ConfigError(f"`{name}` must be {expected}, not {value!r}")


def is_number(value: Any) -> bool:
    """Whether a field's value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: Any) -> bool:
    """Whether a field's value is a positive int."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def require_counts(config: AdapterConfig, *names: str) -> None:
    """Raise `ConfigError` unless each field is a positive int."""
    for name in names:
        require(is_count(getattr(config, name)), name, getattr(config, name), "a positive int")


def require_naturals(config: AdapterConfig, *names: str) -> None:
    """Raise `ConfigError` unless each field is an int that is not negative."""
    for name in names:
        value = getattr(config, name)
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        require(fits, name, value, "an int that is not negative")


def require_flags(config: AdapterConfig, *names: str) -> None:
    """Raise `ConfigError` unless each field is True or False."""
    for name in names:
        require(isinstance(getattr(config, name), bool), name, getattr(config, name), "True or False")


def require_bias(config: Any, adapted: str) -> None:
    """Raise `ConfigError` unless `bias` says which biases train; `adapted` is PEFT's word for adapted modules'."""
    require(config.bias in ("none", "all", adapted), "bias", config.bias, f'"none", "all" or "{adapted}"')


def require_patterns(config: AdapterConfig, name: str, fits: Callable[[Any], bool], expected: str) -> None:
    """Raise `ConfigError` unless a field maps regexes of module names to values that fit."""
    value = getattr(config, name)
    holds = isinstance(value, Mapping) and all(isinstance(key, str) and fits(each) for key, each in value.items())
    require(holds, name, value, f"a dict of module names to {expected}")
    require_regexes(config, name)


def require_dropouts(config: AdapterConfig, *names: str) -> None:
    """Raise `ConfigError` unless each field is a probability of dropping something."""
    for name in names:
        value = getattr(config, name)
        require(is_number(value) and 0 <= value < 1, name, value, "a number in [0, 1)")


def is_strings(value: Any) -> bool:
    """Whether a field's value is a tuple of strings, as lists are kept."""
    return isinstance(value, tuple) and all(isinstance(item, str) for item in value)


def is_named(names: str | Sequence[str] | None, name: str) -> bool:
    """Whether a module is named by a regex for its whole name, or by one of several endings."""
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in names or ())


def is_saved(saved: Sequence[str], name: str) -> bool:
    """Whether a module is one of those that `modules_to_save` names, or below one."""
    return any(re.match(rf"(^|.*\.){each}($|\..*)", name) for each in saved)


def is_pattern_of(pattern: str, name: str) -> bool:
    """Whether a regex matches the end of a module's name, from a dot on or all of it, as PEFT matches patterns."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _check_names(config: AdapterConfig) -> None:
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        value = getattr(config, name)
        fits = value is None or isinstance(value, str) or is_strings(value)
        require(fits, name, value, "a string, a list of strings or None")
    saved = config.modules_to_save
    require(saved is None or is_strings(saved), "modules_to_save", saved, "a list of strings or None")
    mapping = config.auto_mapping
    require(mapping is None or isinstance(mapping, Mapping), "auto_mapping", mapping, "a dict or None")
    for name in ("peft_type", "task_type", "base_model_name_or_path", "revision", "peft_version"):
        value = getattr(config, name)
        require(isinstance(value, str) or (value is None and name != "peft_type"), name, value, "a string")
    task = config.task_type
    require(task is None or task in TASKS, "task_type", task, f"None or one of {', '.join(TASKS)}")
    require(isinstance(config.inference_mode, bool), "inference_mode", config.inference_mode, "True or False")


def _check_layers(config: AdapterConfig) -> None:
    layers = config.layers_to_transform
    indices = layers if isinstance(layers, tuple) else () if layers is None else (layers,)
    plain_ints = all(isinstance(i, int) and not isinstance(i, bool) for i in indices)
    require(plain_ints, "layers_to_transform", layers, "an int, a list of ints or None")
    if indices and isinstance(config.target_modules, str) and not config.all_linear:
        raise ConfigError("`layers_to_transform` needs `target_modules` as a list; a regex can name the layers itself")
    if config.layers_pattern and not indices:
        raise ConfigError("`layers_pattern` says where the layers are; `layers_to_transform` must say which")


def _check_absent(config: AdapterConfig) -> None:
    for name in config.absent:
        require(getattr(config, name) is None, name, getattr(config, name), f"None: {type(config).__name__} has none")


def _check_regexes(config: AdapterConfig) -> None:
    for name in ("target_modules", "exclude_modules"):
        if isinstance(getattr(config, name), str):
            require_regexes(config, name)
    require_regexes(config, "layers_pattern", "modules_to_save")


def require_regexes(config: AdapterConfig, *names: str) -> None:
    """Raise `ConfigError` unless each field holds valid regular expressions: one, a list of them, or as dict keys."""
    for name in names:
        value = getattr(config, name) or ()
        for expression in (value,) if isinstance(value, str) else value:
            try:
                re.compile(expression)
            except re.error as error:
                raise ConfigError(f"`{name}` holds {expression!r}, which is no valid regex: {error}") from error
