"""PEFT's and Unsloth's names: their signatures, their defaults, PEFT's numbers, and nothing silently ignored."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import peft
import pytest
import torch
from torch import Tensor, nn

import lorafx
from lorafx.adapters.config import TASKS
from lorafx.errors import AdapterError, ConfigError, LorafxError
from lorafx.testing import assert_same_tensors

SETTINGS: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "init_lora_weights": False,
    "task_type": "CAUSAL_LM",
}
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
# Of unsloth/models/llama.py, FastLlamaModel.get_peft_model.
UNSLOTH = {
    "r": 16,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "bias": "none",
    "layers_to_transform": None,
    "layers_pattern": None,
    "finetune_last_n_layers": None,
    "use_gradient_checkpointing": "unsloth",
    "random_state": 3407,
    "max_seq_length": 2048,
    "use_rslora": False,
    "modules_to_save": None,
    "init_lora_weights": True,
    "loftq_config": {},
    "temporary_location": "_unsloth_temporary_saved_buffers",
    "qat_scheme": None,
    "target_parameters": None,
    "ensure_weight_tying": None,
}


def base_model(**overrides: Any) -> nn.Module:
    return models.llama(**{"num_hidden_layers": 1} | overrides)


def unsloth(model: nn.Module | None = None, **settings: Any) -> lorafx.AdaptedModel:
    given = {"use_gradient_checkpointing": False} | settings
    return lorafx.FastLanguageModel.get_peft_model(model or base_model(), **given)


@pytest.fixture(autouse=True)
def no_warning_is_overlooked() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning, module="lorafx|test_compat")
        yield


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An adapter that PEFT made and wrote."""
    folder = tmp_path / "saved"
    peft.get_peft_model(base_model(), peft.LoraConfig(**SETTINGS)).save_pretrained(folder)
    return folder


def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the trainable parameters' gradients by PEFT's file key."""
    output = model(**models.call("llama"))
    output.loss.backward()
    names = {n: n.removeprefix("base_model.model.").replace(".default", "") for n, _ in model.named_parameters()}
    return output.logits, {names[n]: p.grad for n, p in model.named_parameters() if p.requires_grad}


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """The same numbers, added up in another order."""
    assert (actual - expected).norm() <= 32 * torch.finfo(torch.float32).eps * expected.norm()


# --- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lorafx.get_peft_model, peft.get_peft_model),
        (lorafx.PeftModel.from_pretrained, peft.PeftModel.from_pretrained),
        (lorafx.PeftConfig.from_pretrained, peft.PeftConfig.from_pretrained),
    ],
)
def test_signatures_are_those_of_peft(ours: Callable[..., Any], theirs: Callable[..., Any]):
    def arguments(function: Callable[..., Any]) -> list[tuple[Any, ...]]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert arguments(ours) == arguments(theirs)


def test_task_types_are_those_of_peft():
    assert {t.name: t.value for t in lorafx.TaskType} == {t.name: t.value for t in peft.TaskType}
    assert set(TASKS) == set(lorafx.TaskType)
    config = lorafx.LoraConfig(task_type=lorafx.TaskType.CAUSAL_LM)
    assert config == lorafx.LoraConfig(task_type="CAUSAL_LM") == lorafx.LoraConfig.of(config.to_dict())


@pytest.mark.slow
def test_a_loaded_adapter_computes_and_learns_as_in_peft(saved):
    theirs = peft.PeftModel.from_pretrained(base_model(), saved, is_trainable=True)
    ours = lorafx.PeftModel.from_pretrained(base_model(), saved, is_trainable=True)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    (logits, gradients), (expected, their_gradients) = step(ours), step(theirs)
    assert_near(logits, expected)
    assert gradients.keys() == their_gradients.keys()
    for name, gradient in gradients.items():
        assert_near(gradient, their_gradients[name])


@pytest.mark.slow
def test_a_new_adapter_is_what_peft_makes_of_the_same_config():
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM")  # PEFT's own targets for Llama
    ours = lorafx.get_peft_model(base_model(), config, mixed=True)
    assert config.base_model_name_or_path is None
    theirs = peft.get_peft_model(base_model(), config)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    (logits, gradients), (expected, their_gradients) = step(ours), step(theirs)
    assert_near(logits, expected)  # of the base: B is zero at first
    assert gradients.keys() == their_gradients.keys()


def test_arguments_of_get_peft_model_arrive():
    base = base_model().to(torch.bfloat16)
    base.name_or_path = "a/base"
    config = lorafx.LoraConfig(**SETTINGS)
    lora = lorafx.get_peft_model(base, config, "mine", False, False, "v2")
    assert (lora.active_adapter, lora.peft_config["mine"].revision) == ("mine", "v2")
    assert lora.peft_config["mine"].base_model_name_or_path == "a/base"
    assert {p.dtype for p in lora.parameters() if p.requires_grad} == {torch.bfloat16}
    assert config.revision is None
    widened = lorafx.get_peft_model(base_model().to(torch.bfloat16), config)
    assert {p.dtype for p in widened.parameters() if p.requires_grad} == {torch.float32}
    empty = lorafx.get_peft_model(base_model(), config, low_cpu_mem_usage=True)
    assert {p.device.type for p in empty.parameters() if p.requires_grad} == {"meta"}


def test_a_config_of_another_base_or_revision_warns():
    with pytest.warns(UserWarning, match="base_model_name_or_path='a/b'"):
        lorafx.get_peft_model(base_model(), lorafx.LoraConfig(**SETTINGS, base_model_name_or_path="a/b"))
    with pytest.warns(UserWarning, match="revision='v1'; 'v2' is recorded"):
        lorafx.get_peft_model(base_model(), lorafx.LoraConfig(**SETTINGS, revision="v1"), revision="v2")


@pytest.mark.parametrize("config", [peft.VBLoRAConfig(), peft.PromptTuningConfig(num_virtual_tokens=2)], ids=repr)
def test_other_kinds_are_an_error(config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ConfigError):
            lorafx.get_peft_model(base_model(), config, mixed=True)


def test_adapted_models_and_configs_are_instances_of_pefts_names(saved):
    lora = lorafx.get_peft_model(base_model(), lorafx.LoraConfig(**SETTINGS))
    for name in ("", *(f"For{task}" for task in ("CausalLM", "Seq2SeqLM", "SequenceClassification"))):
        assert isinstance(lora, getattr(lorafx, f"PeftModel{name}"))
    assert isinstance(lora, type(base_model()))
    assert not isinstance(lora.unload(), lorafx.PeftModel)
    config = lorafx.PeftConfig.from_pretrained(saved)
    assert isinstance(config, lorafx.PeftConfig)
    assert (config.r, set(config.target_modules)) == (4, set(SETTINGS["target_modules"]))
    with pytest.raises(AdapterError, match="adapted already"):
        lorafx.get_peft_model(lorafx.get_peft_model(base_model(), config), config)


def test_from_pretrained_is_for_inference_unless_asked(saved):
    lora = lorafx.PeftModel.from_pretrained(base_model(), saved, "mine")
    assert not lora.training
    assert not [n for n, p in lora.named_parameters() if p.requires_grad]
    assert lora.active_adapter == "mine"
    assert lora.peft_config["mine"].inference_mode
    trainable = lorafx.PeftModel.from_pretrained(base_model(), saved, is_trainable=True)
    assert all("lora_" in n for n, p in trainable.named_parameters() if p.requires_grad)
    assert not trainable.peft_config["default"].inference_mode
    half = lorafx.PeftModel.from_pretrained(base_model().to(torch.bfloat16), saved, autocast_adapter_dtype=False)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.slow
def test_a_config_given_to_from_pretrained_is_used(saved):
    config = peft.LoraConfig(**SETTINGS | {"lora_alpha": 60})
    lora = lorafx.PeftModel.from_pretrained(base_model(), saved, config=config, low_cpu_mem_usage=True)
    assert lora.peft_config["default"].lora_alpha == 60
    assert_near(lora(**models.call(lora)).logits, _with_alpha(saved, 60)(**models.call("llama")).logits)


def _with_alpha(saved: Path, alpha: float) -> nn.Module:
    config = peft.LoraConfig(**SETTINGS | {"lora_alpha": alpha})
    return peft.PeftModel.from_pretrained(base_model(), saved, config=config)


def test_old_weights_are_read_through_the_restricted_unpickler(saved, tmp_path):
    model = peft.PeftModel.from_pretrained(base_model(), saved)
    model.save_pretrained(tmp_path / "old", safe_serialization=False)
    lora = lorafx.PeftModel.from_pretrained(base_model(), tmp_path / "old", weights_only=True)
    same = lorafx.PeftModel.from_pretrained(
        base_model(), saved, backend="eager", capture="graph", adapter_compute_dtype="float32"
    )
    assert_same_tensors(dict(lora.named_parameters()), dict(same.named_parameters()))


@pytest.mark.parametrize(
    "asked",
    [{"ephemeral_gpu_offload": True}, {"key_mapping": {"a": "b"}}, {"torch_device": "cpu"}, {"use_auth_token": "x"}],
    ids=lambda asked: next(iter(asked)),
)
def test_what_from_pretrained_cannot_honour_is_an_error(saved, asked):
    with pytest.raises(ConfigError, match=next(iter(asked))):
        lorafx.PeftModel.from_pretrained(base_model(), saved, **asked)


@pytest.mark.slow
def test_training_goes_on_exactly_where_it_left_off(tmp_path):
    lora = lorafx.get_peft_model(base_model(), lorafx.LoraConfig(**SETTINGS))
    losses = _train(lora, 3)
    assert losses == sorted(losses, reverse=True)
    lora.save_pretrained(tmp_path)
    resumed = lorafx.PeftModel.from_pretrained(base_model(), tmp_path, is_trainable=True)
    assert resumed.training == lora.training
    assert _train(resumed, 2) == _train(lora, 2)
    assert_same_tensors(dict(resumed.named_parameters()), dict(lora.named_parameters()))


def _train(model: nn.Module, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(steps):
        loss = model(**models.call("llama")).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# --- Unsloth ---------------------------------------------------------------------------------------------------------


def test_the_signature_is_that_of_unsloth():
    parameters = inspect.signature(lorafx.FastLanguageModel.get_peft_model).parameters
    assert {n: p.default for n, p in parameters.items() if n not in ("model", "kwargs")} == UNSLOTH
    assert list(parameters) == ["model", *UNSLOTH, "kwargs"]


@pytest.mark.slow
def test_unsloths_defaults_adapt_the_seven_projections():
    base = base_model()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    lora = unsloth(base)
    config = lora.peft_config["default"]
    assert {site.name.rpartition(".")[2] for site in lora.sites} == PROJECTIONS
    assert (config.r, config.lora_alpha, config.task_type) == (16, 16, "CAUSAL_LM")
    assert_same_tensors(base.state_dict(), before)
    loss = lora(**models.call(lora)).loss
    loss.backward()
    assert all(p.grad is not None for p in lora.parameters() if p.requires_grad)


def test_random_state_seeds_the_adapter_alone():
    torch.manual_seed(5)
    first, after = unsloth(), torch.rand(())
    torch.manual_seed(5)
    assert torch.rand(()) == after
    assert_same_tensors(dict(unsloth().named_parameters()), dict(first.named_parameters()))
    other = dict(unsloth(random_state=1).named_parameters())
    assert not [n for n, p in first.named_parameters() if "lora_A" in n and torch.equal(p, other[n])]


@pytest.mark.parametrize("asked", [True, "unsloth"])
def test_gradient_checkpointing_is_switched_on(asked, recwarn, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lora = unsloth(use_gradient_checkpointing=asked)
    assert lora.is_gradient_checkpointing
    said = [str(w.message) for w in recwarn if "no CUDA device" in str(w.message)]
    assert len(said) == (asked == "unsloth")


def test_embeddings_among_the_targets_are_trained_whole():
    with pytest.warns(UserWarning, match="lm_head, embed_tokens moved"):
        lora = unsloth(target_modules=["q_proj", "lm_head", "embed_tokens"], modules_to_save=("lm_head",))
    config = lora.peft_config["default"]
    assert (config.target_modules, config.modules_to_save) == (("q_proj",), ("lm_head", "embed_tokens"))
    trained = {n for n, p in lora.named_parameters() if p.requires_grad and "lora_" not in n}
    assert trained == {"lm_head.modules_to_save.default.weight", "model.embed_tokens.modules_to_save.default.weight"}


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "trained"), [("float16", "float32"), ("bfloat16", "bfloat16")])
def test_embeddings_of_a_float16_base_train_in_float32(dtype, trained):
    """As in Unsloth, for float16 loses small steps, and a gradient scaler refuses parameters in it."""
    base = base_model().to(getattr(torch, dtype))
    lora = unsloth(base, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    copies = {n: p for n, p in lora.named_parameters() if "modules_to_save" in n}
    assert {p.dtype for p in copies.values()} == {getattr(torch, trained)} and len(copies) == 2
    assert {p.dtype for p in base.parameters()} == {getattr(torch, dtype)}
    optimizer = torch.optim.SGD(copies.values(), lr=1e-4)
    before = {name: copy.detach().clone() for name, copy in copies.items()}
    lora(**models.call(lora)).loss.backward()
    optimizer.step()
    if trained == "float32":
        assert all((copy != before[name])[copy.grad != 0].any() for name, copy in copies.items())


def test_what_unsloth_does_unasked_is_warned_of():
    tied = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    with pytest.warns(UserWarning, match="tied no longer"):
        unsloth(base_model(tie_word_embeddings=True), **tied)
    unsloth(base_model(tie_word_embeddings=True), target_modules=["q_proj"])
    unsloth(**tied)


def test_the_last_layers_can_be_chosen():
    base = base_model(num_hidden_layers=3)
    assert {site.name.split(".")[2] for site in unsloth(base, finetune_last_n_layers=2).sites} == {"1", "2"}
    chosen = unsloth(base_model(num_hidden_layers=3), finetune_last_n_layers=2, layers_to_transform=[0])
    assert {site.name.split(".")[2] for site in chosen.sites} == {"0"}
    assert len(unsloth(finetune_last_n_layers=9).sites) == 7
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        unsloth(models.mlp(), target_modules=["up"], finetune_last_n_layers=1)


def test_a_classifier_keeps_its_head_trained():
    lora = unsloth(models.bert(num_hidden_layers=1), target_modules=["query"])
    assert lora.peft_config["default"].task_type == "SEQ_CLS"
    assert any(n.startswith("classifier.") and p.requires_grad for n, p in lora.named_parameters())


def test_more_fields_of_the_config_arrive():
    lora = unsloth(target_modules="all-linear", rank_pattern={"q_proj": 3}, exclude_modules=["k_proj"], use_rslora=True)
    assert not [site for site in lora.sites if "k_proj" in site.name]
    assert dict(lora.named_parameters())["model.layers.0.self_attn.q_proj.lora_A.default.weight"].shape[0] == 3


@pytest.mark.parametrize(
    "asked",
    [
        {"qat_scheme": "int4"},
        {"finetune_vision_layers": True},
        {"loftq_config": {"loftq_bits": 4}},
        {"init_lora_weights": "loftq"},
        {"r": 0},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_what_unsloth_knows_and_lorafx_does_not_is_an_error(asked):
    with pytest.raises(ConfigError, match=next(iter(asked))):
        unsloth(**asked)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("AutoPeftModelForCausalLM", r"load the base .* `lorafx.load"),
        ("inject_adapter_in_model", "`lorafx.compile"),
        ("PromptTuningConfig", "prompt learning"),
        ("XLoraConfig", "kinds.md"),
        ("LoraModel", "`lorafx.compile"),
    ],
)
def test_a_name_of_pefts_that_is_not_there_says_what_to_use(name, instead):
    with pytest.raises(ImportError, match=f"lorafx has no {name}: .*{instead}") as caught:
        exec(f"from lorafx import {name}")
    assert isinstance(caught.value, LorafxError)
    with pytest.raises(ImportError, match="cannot import name"):
        exec("from lorafx import Lora")
