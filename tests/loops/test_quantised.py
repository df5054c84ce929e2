"""Trainer, SFTTrainer and Unsloth's entry train adapters on quantised bases as they do PEFT's: QLoRA."""

from __future__ import annotations

import warnings
from functools import partial

import models
import numpy as np
import pytest
import torch

pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes")

import quantised
from test_trainer import losses, trainer
from test_trl import logged, sft
from twins import trained

import lorafx
from lorafx.serving import early_calls

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*deprecated")]
READY = (partial(lorafx.prepare_model_for_kbit_training, gradient_checkpointing_kwargs={"use_reentrant": False}),) * 2
ONE_LAYER = {"num_hidden_layers": 1}


def both(folder, how):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantised.twins(folder, how, READY, base=ONE_LAYER)


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_fifty_steps_track_peft_and_are_resumed(tmp_path, how, monkeypatch):
    ours, theirs = both(tmp_path, how)
    steps = {"max_steps": 50, "save_steps": 40, "learning_rate": 5e-3}
    mine, other = (trainer(model, tmp_path / name, **steps) for name, model in (("ours", ours), ("theirs", theirs)))
    mine.train()
    other.train()
    assert len(losses(mine)) == 50
    np.testing.assert_allclose(losses(mine), losses(other), rtol=1e-3)
    assert np.mean(losses(mine)[-5:]) < 0.98 * np.mean(losses(mine)[:5])
    assert [call.served_by for call in ours.explain().calls] == ["graph"]
    for name, value in trained(theirs).items():
        torch.testing.assert_close(trained(ours)[name], value, rtol=0, atol=1e-2 * value.abs().max().item())

    base = READY[0](quantised.quantised(tmp_path / "base", how))
    again = lorafx.load(base, tmp_path / "start", is_trainable=True)
    half = trainer(again, tmp_path / "half", **steps)
    half.train(resume_from_checkpoint=str(tmp_path / "ours/checkpoint-40"))
    assert losses(half) == losses(mine)
    assert all(torch.equal(value, trained(again)[name]) for name, value in trained(ours).items())

    monkeypatch.setattr(early_calls, "REPEATS", 1000)  # this is about what was learnt
    prompt = {"input_ids": models.call("llama")["input_ids"], "max_new_tokens": 5, "do_sample": False}
    generated = [model.eval().generate(**prompt) for model in (ours, again, theirs)]
    assert torch.equal(generated[0], generated[1]) and torch.equal(generated[0], generated[2])


def test_sft_trains_as_peft_does(tmp_path):
    runs = [sft(model, tmp_path / name) for name, model in zip(("ours", "theirs"), both(tmp_path, "nf4"))]
    for run in runs:
        run.train()
    # trl has the adapter in bfloat16, in which PEFT multiplies then, and lorafx in the activations' float32
    losses = [logged(run)["loss"] for run in runs]
    np.testing.assert_allclose(*losses, rtol=torch.finfo(torch.bfloat16).eps)
    assert len(set(losses[0])) == 4
    assert {p.dtype for p in runs[0].model.parameters() if p.requires_grad} == {torch.bfloat16}


def test_unsloths_entry_trains(tmp_path, monkeypatch):
    base = quantised.quantised(tmp_path / "base", "nf4", **ONE_LAYER)
    with pytest.warns(UserWarning, match="checkpoints stay where they are"):
        lora = lorafx.FastLanguageModel.get_peft_model(
            base, r=4, lora_alpha=8, loftq_config={}, use_gradient_checkpointing="unsloth", random_state=3407
        )
    inputs = models.call("llama")
    optimiser = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=2e-2)
    found = []
    for _ in range(8):
        loss = lora.train()(**inputs).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        found.append(loss.item())
    assert found[-1] < 0.9 * found[0]
    code = lora.graph(**inputs).code
    assert "offload_block" in code or "checkpoint_block" in code
    lora.save_pretrained(tmp_path / "saved")
    monkeypatch.setattr(early_calls, "REPEATS", 1000)
    again = lorafx.load(quantised.quantised(tmp_path / "base", "nf4"), tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, lora.eval()(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_optimizers_of_8_bits_train_as_they_do_with_peft(tmp_path):
    """Their states are of 8 bits for tensors of 4096 numbers or more, which no adapter here has, but a head."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "down_proj"]}
        pair = quantised.twins(tmp_path, "nf4", READY, config, base=ONE_LAYER | {"vocab_size": 128})
    options = {"max_steps": 4, "optim": "paged_adamw_8bit"}
    runs = [trainer(model, tmp_path / name, **options) for name, model in zip("ab", pair)]
    for run in runs:
        run.train()
    np.testing.assert_allclose(*map(losses, runs), rtol=1e-4)
    states = runs[0].optimizer.optimizer.state.values()
    assert {state["state1"].dtype for state in states} == {torch.uint8, torch.float32}
