"""transformers' own Trainer, unchanged, trains an adapted model as it trains PEFT's."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from twins import texts, trained, twins

import lorafx

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*deprecated")]


def trainer(
    model, folder: Path, *, family: str = "llama", metrics=None, callbacks=(), **options
) -> transformers.Trainer:
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "save_steps": 2,
        "learning_rate": 2e-2,
        "use_cpu": True,
        "report_to": [],
        "seed": 5,
        "disable_tqdm": True,
        **options,
    }
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(**settings),
        train_dataset=datasets.Dataset.from_list(texts(family=family)),
        eval_dataset=datasets.Dataset.from_list(texts(4, family=family, seed=9)),
        compute_metrics=metrics,
        callbacks=list(callbacks),
    )


def losses(trainer: transformers.Trainer) -> list[float]:
    """Every loss that was logged, of training and of evaluation."""
    return [log[key] for log in trainer.state.log_history for key in ("loss", "eval_loss") if key in log]


def graphs(lora) -> int:
    """How many graphs were captured; nothing may have been served otherwise."""
    calls = lora.explain().calls
    assert all(call.served_by == "graph" for call in calls)
    return len(calls)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 3}),
        ("bert", {"weight_decay": 0.1}),
    ],
)
def test_it_trains_as_peft_does(tmp_path, family, options):
    ours, theirs = twins(tmp_path, family=family)
    mine, other = (
        trainer(model, tmp_path / name, family=family, eval_strategy="steps", eval_steps=2, **options)
        for name, model in (("ours", ours), ("theirs", theirs))
    )
    for each in (mine, other):
        each.train()
    np.testing.assert_allclose(losses(mine), losses(other), rtol=2e-5)
    assert len(set(losses(mine))) == len(losses(mine)) >= 4
    assert graphs(ours) == 2  # one for training, one for evaluation
    names = {file.name for file in (tmp_path / "ours/checkpoint-2").iterdir()}
    assert names == {file.name for file in (tmp_path / "theirs/checkpoint-2").iterdir()}
    saved = [load_file(tmp_path / name / "checkpoint-4/adapter_model.safetensors") for name in ("ours", "theirs")]
    assert saved[0].keys() == saved[1].keys() and len(saved[0]) == len(trained(ours))


@pytest.mark.usefixtures("as_shipped")
def test_a_resumed_run_has_the_losses_of_one_that_went_on(tmp_path):
    dropout = {"lora_dropout": 0.2}  # the random state must be resumed too
    ours, _ = twins(tmp_path, config=dropout)
    whole = trainer(ours, tmp_path / "whole")
    whole.train()
    again = lorafx.load(twins(tmp_path / "other")[0].unload(), tmp_path / "start", is_trainable=True)
    optimised = {id(p) for p in again.parameters() if p.requires_grad}
    half = trainer(again, tmp_path / "half")
    half.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert losses(half) == losses(whole) and len(losses(half)) == 4
    assert {id(p) for group in half.optimizer.param_groups for p in group["params"]} == optimised
    after = trained(again)
    assert after and all(torch.equal(value, after[name]) for name, value in trained(ours).items())


@pytest.mark.usefixtures("as_shipped")
def test_the_best_adapter_is_loaded_at_the_end(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    ours, _ = twins(tmp_path, family="bert")
    run = trainer(ours, tmp_path / "run", family="bert", **options, learning_rate=0.1, lr_scheduler_type="constant")
    run.train()
    evaluated = [log["eval_loss"] for log in run.state.log_history if "eval_loss" in log]
    assert run.state.best_metric == min(evaluated) < evaluated[-1]
    assert run.evaluate()["eval_loss"] == min(evaluated)
    best = load_file(Path(run.state.best_model_checkpoint) / "adapter_model.safetensors")
    for key, value in best.items():
        path = key.removeprefix("base_model.model.").replace(".weight", ".default.weight")
        if "lora_" in path:
            assert torch.equal(ours.get_parameter(path), value)
    run.save_model(str(tmp_path / "final"))
    assert {p.name for p in (tmp_path / "final").iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}
    assert not (tmp_path / "final/model.safetensors").exists()


def test_metrics_and_predictions_are_peft_s(tmp_path):
    def accuracy(prediction):
        return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}

    ours, theirs = twins(tmp_path, family="bert")
    mine, other = (trainer(m, tmp_path / "run", family="bert", metrics=accuracy) for m in (ours, theirs))
    rows = datasets.Dataset.from_list(texts(5, family="bert", seed=11))
    first, second = mine.predict(rows), other.predict(rows)
    np.testing.assert_allclose(first.predictions, second.predictions, rtol=1e-4, atol=1e-5)
    assert first.metrics["test_accuracy"] == second.metrics["test_accuracy"]
    assert mine.evaluate()["eval_accuracy"] == other.evaluate()["eval_accuracy"]


def test_bfloat16_errs_no_more_than_peft_s(tmp_path):
    """Both round, at different places; the first step's loss is as close to float32's as PEFT's is."""
    step = {"max_steps": 1}
    _, exact = twins(tmp_path)
    ours, theirs = twins(tmp_path)
    (full,), (mine,), (other,) = (
        losses(run)
        for run in (
            trainer(exact, tmp_path / "a", **step),
            trainer(ours, tmp_path / "b", bf16=True, **step),
            trainer(theirs, tmp_path / "c", bf16=True, **step),
        )
        if run.train()
    )
    assert mine != full != other
    assert abs(mine - full) < max(2 * abs(other - full), 2e-3)
    assert all(p.dtype == torch.float32 for p in trained(ours).values())


@pytest.mark.parametrize("capture", ["graph", "sites"])
def test_checkpointing_saves_as_much_as_pefts(tmp_path, capture):
    theirs = twins(tmp_path)[1]
    ours = lorafx.load(theirs.unload(), tmp_path / "start", is_trainable=True, capture=capture)
    theirs = twins(tmp_path / "other")[1]
    runs = [trainer(model, tmp_path / "run", gradient_checkpointing=True, max_steps=2) for model in (ours, theirs)]
    held = []
    for run in runs:
        saved: list[int] = []
        pack = torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.numel()) or t, lambda t: t)
        with warnings.catch_warnings(), pack:
            warnings.simplefilter("ignore")
            run.train()
        held.append(sum(saved))
    np.testing.assert_allclose(losses(runs[0]), losses(runs[1]), rtol=2e-5)
    assert held[0] < 1.5 * held[1], held


def test_only_the_model_s_own_columns_reach_it(tmp_path):
    for family in ("llama", "bert"):
        mine, other = (trainer(model, tmp_path / "run") for model in twins(tmp_path / family, family=family))
        for run in (mine, other):
            assert set(next(iter(run.get_train_dataloader()))) == {"input_ids", "attention_mask", "labels"}
        for asked in ("_signature_columns", "label_names", "can_return_loss", "model_accepts_loss_kwargs"):
            assert as_set(getattr(mine, asked)) == as_set(getattr(other, asked)), asked


def as_set(value):
    return set(value) if isinstance(value, list) else value


def test_without_peft_a_model_is_what_it_is():
    script = (
        "import sys; sys.path[:0] = ['tests']\n"
        "import models, lorafx\n"
        "lora = lorafx.compile(models.mlp(), {'target_modules': 'all-linear', 'r': 2})\n"
        "assert 'peft' not in sys.modules and lora.__class__ is type(lora)\n"
        "import peft\n"
        "assert isinstance(lora, peft.PeftModel) and not issubclass(type(lora), peft.PeftModel)\n"
        "assert not hasattr(lora, 'get_prompt') and lora.__class__.__name__ == 'Mlp'\n"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}

    subprocess.run([sys.executable, "-c", script], check=True, cwd=root, env=environment)
