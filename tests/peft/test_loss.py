"""Models whose loss is fused train as PEFT's do, and give the same logits to who asks."""

from __future__ import annotations

import copy

import models
import peft
import pytest
import torch
import transformers
from losses import EPS, assert_equal, outcome, times_asked
from torch.nn import functional as F

import lorafx
from lorafx.lowering.backend import Backend

pytestmark = pytest.mark.slow  # real PEFT beside lorafx, many captures

V = models.VOCABULARY
CAUSAL = {"vocab_size": V, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1}


HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def causal(family, **overrides):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**CAUSAL, **HEADS, **overrides)
    return getattr(transformers, f"{family}ForCausalLM")(config)


MODELS = {
    "llama": lambda: models.llama(num_hidden_layers=1),
    "gpt2": lambda: models.gpt2(n_layer=1),
    "t5": lambda: models.t5(num_layers=1),
    "gemma2": lambda: causal("Gemma2", head_dim=16, final_logit_softcapping=0.5),
    "cohere": lambda: causal("Cohere", logit_scale=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "tied": lambda: models.llama(num_hidden_layers=1, tie_word_embeddings=True),
}


def against_peft(model, **config):
    """One adapter on two equal models."""
    settings = {"r": 4, "lora_alpha": 10, "target_modules": "all-linear", "init_lora_weights": False, **config}
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings))
    ours = lorafx.compile(model, settings)
    state = {name.replace("base_model.model.", ""): value for name, value in theirs.state_dict().items()}
    own = ours.state_dict()
    missing = [name for name in own if name not in state and "base_layer" not in name]
    by_name = {name.replace(".base_layer", ""): value for name, value in state.items()}
    ours.load_state_dict({name: by_name.get(name, value) for name, value in own.items()})
    assert not [name for name in missing if "lora" in name]
    return ours.train(), theirs.train()


def named(outcome):
    loss, logits, found = outcome
    return loss, logits, {name.replace("base_model.model.", ""): gradient for name, gradient in found.items()}


def assert_as_peft(ours, theirs, factor=512, **call):
    """A layer deep, sums over 18 rows and 90 classes, each rounded apart."""
    for through_logits in (False, True):
        mine = outcome(ours, **call, through_logits=through_logits)
        assert_equal(mine, named(outcome(theirs, **call, through_logits=through_logits)), EPS, factor)
    assert any("fused; logits asked for" in each.loss for each in ours.explain().calls)


def batch(rows=2, length=9):
    ids = torch.randint(3, V, (rows, length))
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    ours, theirs = against_peft(MODELS[name]())
    assert_as_peft(ours, theirs, **batch())


@pytest.mark.parametrize(
    "config",
    [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
    ids=["adapted head", "trained head"],
)
def test_heads_that_train(config):
    ours, theirs = against_peft(models.llama(num_hidden_layers=1), **config)
    assert_as_peft(ours, theirs, **batch())


def test_number_of_items():
    ours, theirs = against_peft(models.llama(num_hidden_layers=1))
    assert_as_peft(ours, theirs, **batch(), num_items_in_batch=7)
    assert_as_peft(ours, theirs, **batch(), num_items_in_batch=torch.tensor(11))


def test_dropout_before_an_adapted_head_is_that_of_the_logits():
    ours, _ = against_peft(models.llama(num_hidden_layers=1), target_modules=["lm_head"], lora_dropout=0.5)
    call = batch()
    loss, logits, *_ = ours(**call).to_tuple()
    again = F.cross_entropy(logits[:, :-1].reshape(-1, V), call["labels"][:, 1:].reshape(-1))
    assert torch.allclose(loss, again, rtol=1e-6)


def test_bfloat16():
    """Loss and logits agree to the dtype; gradients pass two layers of roundings of eps = 2⁻⁷."""
    ours, theirs = against_peft(models.llama().bfloat16(), target_modules=["q_proj", "v_proj"])
    call = batch()
    mine, other = outcome(ours, **call), named(outcome(theirs, **call))
    assert mine[0].dtype == other[0].dtype and abs(mine[0] - other[0]) <= 2**-7 * other[0]
    for name, gradient in other[2].items():
        assert (mine[2][name] - gradient).norm() <= 2**-5 * gradient.norm(), name


@pytest.mark.parametrize(
    ("backend", "without"),
    [("aot_eager", ()), ("aot_eager", ("outline_blocks", "checkpoint_blocks")), ("inductor", ())],
    ids=["aot_eager pieces", "aot_eager whole", "inductor pieces"],
)
def test_lowered(backend, without):
    model, call = models.llama(num_hidden_layers=2 if without else 1), batch()
    ours = lorafx.compile(model, {"r": 4, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False})
    expected = outcome(ours, **call, through_logits=True)
    ours._lorafx.dispatcher.backend = Backend(backend)
    ours._lorafx.dispatcher.pipeline = lorafx.passes.default.without(*without)
    ours._lorafx.dispatcher.clear()
    found = outcome(ours, **call, through_logits=True)
    assert_equal(found, expected, EPS, 512)
    with torch.no_grad():
        before = times_asked(ours)
    lora_loss = ours(**batch(3, 7)).loss
    assert lora_loss.isfinite() and times_asked(ours) == before


def test_trainer_never_asks_and_evaluation_does(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, V, (12, 9)).tolist()]
    lora = lorafx.compile(models.llama(num_hidden_layers=1), {"r": 4, "target_modules": "all-linear"})
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=True
    )
    trainer = transformers.Trainer(lora, arguments, train_dataset=rows, eval_dataset=rows[:4])
    trainer.train()
    assert {call.loss for call in lora.explain().calls} == {"fused"}
    trainer.evaluate()
    assert {call.loss for call in lora.explain().calls} == {"fused"}
    predicted = trainer.predict(rows[:4])
    assert predicted.predictions.shape == (4, 9, V)
    assert any("asked for" in call.loss for call in lora.explain().calls)
