"""LoraConfig: PEFT's fields and defaults, checked, and nothing ignored."""

import dataclasses

import peft
import pytest

import lorafx
from lorafx.adapters.kinds.lora_config import NOT_YET
from lorafx.errors import ConfigError


def test_fields_and_defaults_are_pefts():
    ours = {f.name: f for f in dataclasses.fields(lorafx.LoraConfig)}
    theirs = {f.name for f in dataclasses.fields(peft.LoraConfig)}
    assert theirs - set(ours) == {"runtime_config"}, "a switch of a process, never written to a file"
    assert set(ours) - theirs == {"extra"}
    plain, reference = lorafx.LoraConfig(), peft.LoraConfig()
    for name in set(ours) & theirs - {"peft_version", "peft_type"}:
        assert getattr(plain, name) == getattr(reference, name), name


def test_a_peft_config_and_a_dict_mean_the_same():
    options = {"r": 4, "target_modules": ["b", "a"], "task_type": "CAUSAL_LM", "rank_pattern": {"a": 2}}
    ours = lorafx.LoraConfig.of(peft.LoraConfig(**options))
    assert ours.replace(peft_version=None) == lorafx.LoraConfig.of({**options, "target_modules": {"a", "b"}})
    assert ours.target_modules == ("a", "b") and ours.task_type == "CAUSAL_LM"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", "8"),
        ("r", True),
        ("r", 2.5),
        ("lora_alpha", "16"),
        ("lora_dropout", 1.0),
        ("lora_dropout", -0.1),
        ("use_rslora", 1),
        ("bias", "some"),
        ("init_lora_weights", 3),
        ("target_modules", 7),
        ("target_modules", ["a", 1]),
        ("exclude_modules", 7),
        ("layers_to_transform", "1"),
        ("layers_to_transform", [1, "2"]),
        ("layers_pattern", "layers"),
        ("rank_pattern", {"a": 0}),
        ("rank_pattern", ["a"]),
        ("alpha_pattern", {"a": "b"}),
        ("modules_to_save", "classifier"),
        ("task_type", 3),
        ("task_type", "SEQ_CLF"),
        ("peft_type", None),
        # without effect or refused by `compile`, but wrong
        *[(name, value) for name in NOT_YET if name.endswith("_config") for value in (5, "x", [1])],
        *[
            (name, value)
            for name in ("use_bdlora", "layer_replication", "target_parameters")
            for value in (5, "x", [5])
        ],
        *[("alora_invocation_tokens", value) for value in (5, "x", ["x"], [True])],
        *[("trainable_token_indices", value) for value in (5, "x", ["x"], {"embed_tokens": 5}, {3: [5]})],
        *[("layer_replication", value) for value in (5, "x", [5], [[0]], [[0, "1"]], [[0, 1, 2]])],
        *[("megatron_core", value) for value in (5, ["megatron.core"])],
        *[("qalora_group_size", value) for value in ("x", 0, None, 2.5)],
        *[("ensure_weight_tying", value) for value in ("yes", 1, None)],
    ],
)
def test_a_wrong_value_names_its_field(field, value):
    with pytest.raises(ConfigError, match=f"`{field}`"):
        lorafx.LoraConfig(**{field: value})


def test_layers_need_a_list_of_targets():
    with pytest.raises(ConfigError, match="layers_to_transform"):
        lorafx.LoraConfig(target_modules="a.*", layers_to_transform=[1])


@pytest.mark.parametrize("field", NOT_YET)
def test_a_known_field_that_is_not_implemented_is_refused_at_compile(field):
    from graphs import Chain

    model = Chain()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ConfigError, match=field):
        lorafx.compile(model, {"target_modules": ["first"], field: "something"})
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize(
    ("init", "said"),
    [
        ("pissa_niter_x", "no start value; nearest: pissa_niter_4"),
        ("pisa", "no start value; nearest: pissa"),
        ("nonsense", "no start value; there are gaussian, orthogonal"),
    ],
)
def test_an_init_that_is_not_implemented_is_refused(init, said):
    from graphs import Chain

    with pytest.raises(ConfigError, match=f"(?=.*init_lora_weights).*{said}"):
        lorafx.compile(Chain(), {"target_modules": ["first"], "init_lora_weights": init})


def test_unknown_fields_are_kept_and_written_back():
    with pytest.warns(UserWarning, match="from_the_future"):
        config = lorafx.LoraConfig.of({"r": 4, "from_the_future": {"deep": [1, 2]}})
    assert config.to_dict()["from_the_future"] == {"deep": [1, 2]}


def test_a_config_is_frozen_and_reads_itself_back():
    config = lorafx.LoraConfig(r=4, target_modules=["a"], alpha_pattern={"a": 3.0}, layers_to_transform=[1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 5
    assert lorafx.LoraConfig.from_dict(config.to_dict()) == config


def test_something_else_is_no_config():
    with pytest.raises(ConfigError, match="not int"):
        lorafx.LoraConfig.of(3)
