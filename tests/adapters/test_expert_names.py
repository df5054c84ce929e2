"""expert_names: a config that names experts as if each were a layer means the parameters that have them now."""

import warnings

import pytest
import torch
import transformers

import lorafx
from lorafx.adapters.expert_names import with_experts
from lorafx.errors import AdapterError, ConfigError

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 2}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SWIGLU = ("gate_proj", "up_proj", "down_proj")
EXPERTS = ("gate_up_proj", "down_proj")


def qwen(**options):
    config = transformers.Qwen3MoeConfig(**SIZES, head_dim=8, moe_intermediate_size=20, num_experts=3, **options)
    return transformers.Qwen3MoeForCausalLM(config)


def mixtral():
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=3))


def found(model, **options):
    return with_experts(model, lorafx.LoraConfig(r=4, lora_alpha=6, **options))


@pytest.mark.parametrize(
    "made, targets, modules, parameters",
    [
        (qwen, ["q_proj", *SWIGLU], ("q_proj",), EXPERTS),
        (qwen, ["experts.down_proj"], (), ("down_proj",)),
        (qwen, ["model.layers.1.mlp.experts.0.down_proj"], (), ("model.layers.1.mlp.experts.down_proj",)),
        (qwen, "all-linear", ATTENTION, (*EXPERTS, "gate.weight")),
        (qwen, r".*\.(q|down)_proj", ("q_proj",), ("down_proj",)),
        (
            qwen,
            r".*layers\.1\..*(q|down)_proj",
            ("model.layers.1.self_attn.q_proj",),
            ("model.layers.1.mlp.experts.down_proj",),
        ),
        (mixtral, ["w1", "w2", "w3", "o_proj"], ("o_proj",), EXPERTS),
        (mixtral, ["gate", "o_proj"], ("o_proj",), ("gate.weight",)),
        # names of transformers 4
        (mixtral, ["block_sparse_moe.gate", "o_proj"], ("o_proj",), ("gate.weight",)),
        (mixtral, r".*block_sparse_moe\.experts\.\d+\.w[123]", (), EXPERTS),
        (qwen, [f"experts.{n}.{name}" for n in range(3) for name in SWIGLU], (), EXPERTS),
    ],
)
def test_names_of_layers_mean_the_parameters_that_have_them_now(made, targets, modules, parameters):
    config = found(made(), target_modules=targets)
    assert (config.target_modules, config.target_parameters) == (modules, parameters)


def test_a_parameter_has_the_ranks_of_its_parts_together():
    config = found(qwen(), target_modules=[*SWIGLU, "gate"], rank_pattern={"q_proj": 2})
    assert config.rank_pattern == {"q_proj": 2, r".*\.gate_up_proj": 8}
    assert config.alpha_pattern == {r".*\.gate_up_proj": 12}
    lora = lorafx.compile(qwen(), lorafx.LoraConfig(r=4, target_modules=[*SWIGLU]))
    shapes = {name: tuple(p.shape) for name, p in lora.named_parameters() if p.requires_grad and ".layers.0." in name}
    assert sorted(shapes.values()) == [(3 * 4, 20), (16, 3 * 4), (3 * 8, 16), (2 * 20, 3 * 8)]


def test_what_is_excluded_or_in_other_layers_stays_as_it_is():
    named = found(qwen(), target_modules=["q_proj", *SWIGLU], layers_to_transform=[1])
    assert named.target_parameters == tuple(f"model.layers.1.mlp.experts.{name}" for name in EXPERTS)
    named = found(qwen(), target_modules="all-linear", exclude_modules=["down_proj"])
    assert named.target_parameters == ("gate_up_proj", "gate.weight")
    for excluded in (["experts", "gate"], ["gate_up_proj", "experts.down_proj", "mlp.gate"], r".*\.mlp\..*"):
        config = lorafx.LoraConfig(target_modules="all-linear", exclude_modules=excluded)
        assert with_experts(qwen(), config) is config


@pytest.mark.parametrize("excluded", [["experts"], ["down_proj", "gate_proj", "up_proj"], r".*\.experts\..*"])
@pytest.mark.parametrize("dense", [[], [0]])
def test_nothing_is_said_of_names_that_mean_excluded_experts_alone(excluded, dense):
    model, options = qwen(mlp_only_layers=dense), {"target_modules": ["q_proj", *SWIGLU], "exclude_modules": excluded}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora = lorafx.compile(model, lorafx.LoraConfig(**options))
    keep = bool(dense) and "down_proj" not in excluded
    assert lora.peft_config["default"].target_modules == (("q_proj", *SWIGLU) if dense else ("q_proj",))
    assert len(lora.sites) == 2 + 3 * keep


def test_nothing_is_said_of_stacks_that_all_linear_leaves_out_because_it_has_to():
    for options in ({"exclude_modules": ["experts", "gate"]}, {"modules_to_save": ["mlp"]}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            lora = lorafx.compile(qwen(), lorafx.LoraConfig(target_modules="all-linear", **options))
        assert not any(site.is_parameter for site in lora.sites)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "k_proj", "v_proj", "o_proj", *SWIGLU]])
def test_kinds_that_adapt_no_parameters_leave_experts_alone(targets):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        lora = lorafx.compile(qwen(), lorafx.AdaLoraConfig(total_step=9, target_modules=targets))
    assert len(lora.sites) == 8 and lora.peft_config["default"].target_parameters is None
    assert not any("target_parameters" in str(each.message) for each in said)


def test_models_whose_experts_are_no_stacks_and_names_of_today_are_left_alone():
    named = lorafx.LoraConfig(target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    assert with_experts(qwen(), named) is named
    config = lorafx.LoraConfig(target_modules=["q_proj", *SWIGLU])
    dense = qwen(mlp_only_layers=[0, 1])
    assert with_experts(dense, config) is config
    qwen2 = transformers.Qwen2MoeConfig(
        **SIZES, moe_intermediate_size=20, num_experts=3
    )  # PEFT leaves these alone, too
    assert with_experts(transformers.Qwen2MoeForCausalLM(qwen2), config) is config
    assert with_experts(torch.nn.Sequential(torch.nn.Linear(3, 2)), config) is config


def test_layers_of_the_same_names_are_left_out_with_a_word_unless_named_in_full():
    model = qwen(mlp_only_layers=[0])
    with pytest.warns(UserWarning, match=r"As in PEFT model\.layers\.0\.mlp\.gate_proj and 2 other layers of the same"):
        config = found(model, target_modules=["q_proj", *SWIGLU])
    assert config.target_modules == ("q_proj",)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        named = found(model, target_modules=["model.layers.0.mlp.down_proj", "model.layers.1.mlp.experts.0.down_proj"])
        assert found(qwen(), target_modules=[*SWIGLU]).target_parameters == EXPERTS
    assert named.target_modules == ("model.layers.0.mlp.down_proj",)
    assert named.target_parameters == ("down_proj",)


def test_layers_whose_weights_are_named_beside_experts_are_not_left_out():
    weights = [f"model.layers.0.mlp.{name}.weight" for name in SWIGLU]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora = lorafx.compile(
            qwen(mlp_only_layers=[0]), lorafx.LoraConfig(target_modules=[*SWIGLU], target_parameters=weights)
        )
    assert {site.weight for site in lora.sites} >= {*weights} and len(lora.sites) == 5


@pytest.mark.parametrize("pattern", ["gate_up_proj", r".*\.gate_up_proj", r"layers\.\d+\.mlp\.experts\.gate_up_proj"])
def test_a_rank_of_the_parameter_itself_stands(pattern):
    config = found(qwen(), target_modules=[*SWIGLU], rank_pattern={pattern: 5}, alpha_pattern={pattern: 7})
    assert (config.rank_pattern, config.alpha_pattern) == ({pattern: 5}, {pattern: 7})


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"target_modules": ["up_proj"]},
            r"means up_proj of the experts without gate_proj, .*experts\.gate_up_proj has",
        ),
        ({"target_modules": [*SWIGLU], "rank_pattern": {"up_proj": 2}}, r"`rank_pattern` has 'up_proj' for a part of"),
        ({"target_modules": [*SWIGLU], "lora_dropout": 0.1}, r"no `lora_dropout`, as in PEFT: .*`exclude_modules`"),
    ],
)
def test_what_one_parameter_cannot_have_is_refused_and_nothing_is_changed(options, message):
    model = qwen()
    before = dict(model.named_parameters())
    with pytest.raises(ConfigError, match=message):
        lorafx.compile(model, lorafx.LoraConfig(**options))
    assert all(p is before[name] and p.requires_grad for name, p in model.named_parameters())


def test_adapters_that_come_later_are_named_alike():
    lora = lorafx.compile(qwen(), lorafx.LoraConfig(r=2, target_modules=["q_proj", *SWIGLU]))
    lora.add_adapter("b", lorafx.LoraConfig(r=2, target_modules=["down_proj"]))
    assert lora.peft_config["b"].target_parameters == ("down_proj",)
    lora.delete_adapter("default")
    lora.prepare_for_hotswap(config=lorafx.LoraConfig(r=2, target_modules=["down_proj"]))
    with pytest.raises(AdapterError, match=r"differ in .*target_parameters"):
        lora.prepare_for_hotswap(config=lorafx.LoraConfig(r=2, target_modules=[*SWIGLU]))


def unsloth(model, **options):
    return lorafx.FastLanguageModel.get_peft_model(model, use_gradient_checkpointing=False, **options)


def test_unsloths_entry_adapts_stacked_experts_if_one_of_their_projections_is_a_target():
    for targets, experts in {("q_proj", "up_proj"): ["gate_up_proj"], ("q_proj",): []}.items():
        sites = unsloth(mixtral(), target_modules=[*targets]).sites
        assert {site.parameter for site in sites} == {"weight", *experts}
    config = unsloth(mixtral()).peft_config["default"]
    assert config.target_parameters == ("experts.down_proj", "experts.gate_up_proj")
    assert config.target_modules == ATTENTION and not config.rank_pattern
    config = unsloth(qwen()).peft_config["default"]  # PEFT names these by itself
    assert config.target_parameters == EXPERTS
    assert config.rank_pattern == {r".*\.gate_up_proj": 32}


def test_unsloths_entry_adapts_no_experts_that_are_excluded():
    sites = unsloth(qwen(mlp_only_layers=[0]), exclude_modules=["experts"]).sites
    assert len(sites) == 2 * 4 + 3 and not any(site.is_parameter for site in sites)
