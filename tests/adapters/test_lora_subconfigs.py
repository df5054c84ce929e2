"""Configs in fields of `LoraConfig`: PEFT's fields and defaults, checked by name."""

import dataclasses
import json

import peft
import pytest

import lorafx
from lorafx.adapters.kinds.lora_subconfigs import OF_VARIANTS
from lorafx.errors import ConfigError

CLASSES = {"use_bdlora": "BdLoraConfig", "kasa_config": "KasaConfig"}
CLASSES |= {"monteclora_config": "MontecloraConfig", "velora_config": "VeloraConfig"}


@pytest.mark.parametrize("field", CLASSES)
def test_fields_and_defaults_are_pefts(field):
    theirs = getattr(peft, CLASSES[field])()
    assert OF_VARIANTS[field] == dataclasses.asdict(theirs)
    given = [lorafx.LoraConfig(**{field: value}) for value in (theirs, {})]
    for config in (*given, lorafx.LoraConfig.of(peft.LoraConfig(**{field: theirs}))):
        assert config.variant == field and config.subconfig(field) == OF_VARIANTS[field]
        assert json.loads(json.dumps(config.to_dict())) == config.to_dict(), "a file can hold it"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("use_bdlora", {"nblocks": 0}, r"`use_bdlora\['nblocks'\]` must be a positive int"),
        ("use_bdlora", {"n_blocks": 2}, "`use_bdlora` has no n_blocks; it has target_modules_bd_a"),
        ("use_bdlora", {2: 2}, "`use_bdlora` has no 2; it has"),
        ("use_bdlora", {"target_modules_bd_a": "q_proj"}, "a list of strings or None"),
        ("use_bdlora", {"match_strict": 1}, "True or False"),
        ("kasa_config", {"beta": -1}, "a number from 0"),
        ("monteclora_config", {"num_samples": 0}, "num_samples"),
        ("velora_config", {"init_type": "first"}, "one of batch_average, batch_average_once, random"),
        ("velora_config", {"scale": "1"}, "a number"),
    ],
)
def test_what_such_a_config_may_not_be_is_named(field, value, said):
    with pytest.raises(ConfigError, match=said):
        lorafx.LoraConfig(**{field: value})
