"""Kinds: adapter families, one file each.

A kind is an equation that wraps a base operator, with its tensors, their start values, its config class and the merged
weight. `register` makes one of your own known, under the PEFT type that its config class names.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError
from ..config import NOT_WRITTEN, AdapterConfig, defaults_of
from .activated_lora import ActivatedLora
from .adalora import AdaLora
from .adalora_config import AdaLoraConfig
from .bdlora import BdLora
from .boft import Boft, BOFTConfig
from .c3a import C3A, C3AConfig
from .delora import Delora, DeloraConfig
from .dora import Dora
from .fourierft import FourierFT, FourierFTConfig
from .hira import Hira, HiraConfig
from .hra import Hra, HRAConfig
from .ia3 import Ia3, IA3Config
from .kasa import Kasa
from .kind import SCALING, Kind, Operands, Spec
from .ln_tuning import LNTuning, LNTuningConfig
from .loha import LoHa, LoHaConfig
from .lokr import LoKr, LoKrConfig
from .lora import Lora
from .lora_config import LoraConfig
from .lora_with_tokens import WITH_TOKENS
from .mica import Mica
from .miss import Bat, Miss, MissConfig
from .monteclora import Monteclora
from .oft import Oft, OFTConfig
from .qalora import QaLora
from .randlora import RandLora, RandLoraConfig
from .road import Road, RoadConfig
from .shira import Shira, ShiraConfig
from .trainable_tokens import TrainableTokens, TrainableTokensConfig
from .velora import Velora
from .vera import Vera, VeraConfig

# By PEFT type, the `peft_type` of configs and files: the kinds that share its config class, the latest first.
KINDS: dict[str, list[Kind]] = {}


def register(kind: type[Kind]) -> type[Kind]:
    """Make a kind known, so that its configs and its files are accepted everywhere; returns the class.

    Of kinds with one PEFT type, the latest that `serves` a config has it.
    """
    KINDS.setdefault(defaults_of(kind.config)["peft_type"], []).insert(0, kind())
    return kind


def kind_of(config: AdapterConfig) -> Kind:
    """The kind that a config asks for; `ConfigError` for one that lorafx does not know."""
    known = KINDS.get(config.peft_type, [])
    if found := next((kind for kind in known if kind.serves(config)), None):
        return found
    raise ConfigError(f"peft_type {config.peft_type!r} is not implemented; lorafx knows {', '.join(KINDS)}")


def kind_called(peft_type: str, name: str) -> Kind:
    """The kind of a PEFT type whose class has a name; `ConfigError` where nobody has registered it."""
    if found := next((kind for kind in KINDS.get(peft_type, []) if type(kind).__qualname__ == name), None):
        return found
    raise ConfigError(f"the model has adapters of the kind {name}, which is not known here: `register` it first")


def config_of(config: AdapterConfig | Mapping[str, Any] | Any) -> AdapterConfig:
    """The config as one of its kind's class: from itself, a mapping of its fields, or a `peft` config.

    A mapping without `peft_type` is LoRA's. For a kind that lorafx does not know it is an `AdapterConfig`, with that
    kind's fields in `extra`. Raises `ConfigError` for a field that is wrong, naming it, and for one that there is not
    in a mapping that somebody wrote. One from a file, where `peft_version` stands, may be of a newer PEFT: its other
    fields are kept, with a warning.
    """
    if isinstance(config, AdapterConfig) and type(config) is not AdapterConfig:
        return config
    named = config.get("peft_type", "LORA") if isinstance(config, Mapping) else getattr(config, "peft_type", "LORA")
    known = KINDS.get(getattr(named, "value", named) if isinstance(named, str) else "")
    of_kind = known[0].config if known else AdapterConfig
    if known and isinstance(config, Mapping) and "peft_version" not in config:
        _refuse_unknown(config, of_kind)
    return of_kind.of(config.to_dict() if isinstance(config, AdapterConfig) else config)


def _refuse_unknown(fields: Mapping[str, Any], config: type[AdapterConfig]) -> None:
    known = [name for name in defaults_of(config) if name != "extra"]
    for name in fields:
        if name not in (*known, *NOT_WRITTEN):
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"it has {', '.join(known)}"
            raise ConfigError(f"{config.__name__} has no field `{name}`; {hint}")


for _kind in (
    *(Lora, Dora, BdLora, QaLora, Kasa, Mica, Monteclora, Velora, ActivatedLora),
    *(AdaLora, Ia3, LoHa, LoKr, Oft, Boft, Hra, Vera, Shira, Hira, Miss, Bat),
    *(FourierFT, Delora, RandLora, C3A, Road, LNTuning, TrainableTokens),
):
    register(_kind)
for _with_tokens in WITH_TOKENS:
    register(_with_tokens)

__all__ = [
    "KINDS",
    "SCALING",
    "AdaLoraConfig",
    "BOFTConfig",
    "C3AConfig",
    "DeloraConfig",
    "FourierFTConfig",
    "HRAConfig",
    "HiraConfig",
    "IA3Config",
    "Kind",
    "LNTuningConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoraConfig",
    "MissConfig",
    "OFTConfig",
    "Operands",
    "RandLoraConfig",
    "RoadConfig",
    "ShiraConfig",
    "Spec",
    "TrainableTokensConfig",
    "VeraConfig",
    "config_of",
    "kind_of",
    "register",
]
