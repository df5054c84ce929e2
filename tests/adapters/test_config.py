"""What the configs of all kinds share: where an adapter goes, and kinds told apart by `peft_type`."""

from dataclasses import dataclass

import peft
import pytest
from graphs import Chain

import lorafx
from lorafx.adapters.config import AdapterConfig, require
from lorafx.adapters.kinds import config_of
from lorafx.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OwnConfig(AdapterConfig):
    peft_type: str = "OWN"
    depth: int = 1

    checks = (lambda config: require(config.depth > 0, "depth", config.depth, "a positive int"),)
    null_is_default = ("depth",)


def test_a_kinds_own_checks_come_with_those_of_all():
    with pytest.raises(ConfigError, match="`depth` must be a positive int, not 0"):
        OwnConfig(depth=0)
    with pytest.raises(ConfigError, match="`target_modules`"):
        OwnConfig(target_modules=7)
    with pytest.raises(ConfigError, match=r"`target_modules` holds '\(', which is no valid regex"):
        OwnConfig(target_modules="(")


def test_a_null_that_means_the_default_is_the_default():
    assert OwnConfig.from_dict({"depth": None}).depth == 1
    assert OwnConfig.from_dict({"depth": 3}).depth == 3


def test_without_a_type_it_is_lora():
    assert type(config_of({"r": 4})) is lorafx.LoraConfig
    assert type(config_of(peft.LoraConfig(r=4))) is lorafx.LoraConfig
    own = OwnConfig()
    assert config_of(own) is own
    with pytest.raises(ConfigError, match="not int"):
        config_of(3)


def test_a_type_that_nobody_knows_is_kept_and_refused_by_name():
    with pytest.warns(UserWarning, match="num_vectors"):
        config = config_of(peft.VBLoRAConfig(target_modules=["first"], num_vectors=9))
    assert config.target_modules == ("first",) and config.to_dict()["num_vectors"] == 9
    with pytest.raises(ConfigError, match="'VBLORA' is not implemented; lorafx knows LORA"):
        lorafx.compile(Chain(), config)
