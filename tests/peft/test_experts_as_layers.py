"""Configs that name stacked experts as if each were a layer: PEFT adapts the same, and files fit both ways."""

import copy
import warnings

import peft
import pytest
import torch
import transformers
from torch import nn

import lorafx

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
SWIGLU = ["gate_proj", "up_proj", "down_proj"]


def qwen(**options):
    return transformers.Qwen3MoeConfig(**SIZES, num_key_value_heads=1, head_dim=8, num_experts=3, **options)


def partly_dense():
    return qwen(mlp_only_layers=[0])


def mixtral():
    return transformers.MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=3)


def deepseek():  # with a dense layer first, and an expert that all tokens share
    heads = {"num_key_value_heads": 2, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    groups = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    return transformers.DeepseekV3Config(**SIZES, **heads, **groups, qk_nope_head_dim=8)


@pytest.mark.parametrize(
    ("made", "targets"),
    [
        pytest.param(qwen, ["q_proj", *SWIGLU], marks=pytest.mark.slow),
        pytest.param(partly_dense, ["q_proj", *SWIGLU], marks=pytest.mark.slow),
        (partly_dense, "all-linear"),
        pytest.param(qwen, r".*\.(q|gate|up|down)_proj", marks=pytest.mark.slow),
        (mixtral, ["w1", "w2", "w3", "o_proj", "gate"]),
        pytest.param(mixtral, "all-linear", marks=pytest.mark.slow),
        (deepseek, ["o_proj", *SWIGLU]),
        pytest.param(deepseek, "all-linear", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_peft_adapts_the_same_and_reads_and_writes_the_same_files(tmp_path, made, targets):
    base = random(made())
    options = {"r": 2, "lora_alpha": 6, "target_modules": targets, "init_lora_weights": False}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options)).eval()
    ours = lorafx.compile(copy.deepcopy(base), lorafx.LoraConfig(**options)).eval()
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    config = theirs.peft_config["default"]
    assert {*ours.peft_config["default"].target_parameters} == config.target_parameters
    assert ours.peft_config["default"].rank_pattern == config.rank_pattern

    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing|.*unexpected")
        same(lorafx.load(copy.deepcopy(base), tmp_path / "theirs"), theirs, base)
        same(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval(), ours, base)


def hunyuan():  # whose router is a linear layer in a module of the name that PEFT takes for a parameter's
    return transformers.HunYuanMoEV1Config(**SIZES, num_key_value_heads=1, head_dim=8, num_experts=3, moe_topk=2)


@pytest.mark.parametrize(("made", "targets"), [(hunyuan, "all-linear"), (qwen, r".*(q_proj|gate_proj|up_proj)")])
def test_files_are_read_in_which_peft_names_what_the_model_lacks(tmp_path, made, targets):
    base = random(made())
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=targets, init_lora_weights=False))
    theirs.eval().save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = lorafx.load(copy.deepcopy(base), tmp_path)
    same(read, theirs, base)


def test_a_config_that_is_given_for_a_file_means_experts_too(tmp_path):
    base, config = random(qwen()), lorafx.LoraConfig(target_modules=["q_proj", *SWIGLU], init_lora_weights=False)
    lora = lorafx.compile(copy.deepcopy(base), config).eval()
    lora.save_pretrained(tmp_path)
    same(lorafx.load(copy.deepcopy(base), tmp_path, config=config), lora, base)
    theirs = peft.PeftModel.from_pretrained(
        copy.deepcopy(base), tmp_path, config=peft.LoraConfig(target_modules=["q_proj", *SWIGLU])
    )
    same(theirs.eval(), lora, base)


def test_a_config_that_is_given_for_a_file_without_experts_means_layers(tmp_path):
    base, config = random(partly_dense()), lorafx.LoraConfig(target_modules=[*SWIGLU], exclude_modules=["experts"])
    lora = lorafx.compile(copy.deepcopy(base), config.replace(init_lora_weights=False)).eval()
    with pytest.warns(UserWarning, match=r"would not find it in the file"):
        lora.save_pretrained(tmp_path)
    same(lorafx.load(copy.deepcopy(base), tmp_path, config=config.replace(exclude_modules=None)), lora, base)


def test_layers_that_peft_takes_for_experts_can_be_named_as_parameters(tmp_path):
    base, options = random(deepseek()), {"target_modules": ["o_proj"], "init_lora_weights": False}
    names = [f"model.layers.1.mlp.shared_experts.{name}" for name in SWIGLU]
    lora = lorafx.compile(
        copy.deepcopy(base), lorafx.LoraConfig(**options | {"target_modules": ["o_proj", "shared_experts.up_proj"]})
    )
    with pytest.warns(
        UserWarning, match=r"to have PEFT read .* name model\..*\.shared_experts\.up_proj\.weight in `target_p"
    ):
        lora.save_pretrained(tmp_path / "layers")
    config = lorafx.LoraConfig(**options, target_parameters=[f"{name}.weight" for name in names])
    lora = lorafx.compile(copy.deepcopy(base), config).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora.save_pretrained(tmp_path / "parameters")
    same(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "parameters").eval(), lora, base)


def random(config):
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(config).eval()
    for p in base.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.2)
    return base


@torch.no_grad()
def same(found, expected, base):
    ids = torch.randint(0, 50, (2, 5))
    near(*(model(input_ids=ids).logits for model in (found, expected, base)))


def near(found, expected, without):
    size = float(expected.abs().max())
    assert (expected - without).abs().max() > 0.01 * size
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * size)
