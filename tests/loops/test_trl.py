"""trl's SFTTrainer and DPOTrainer, unchanged, train an adapted model as they train PEFT's."""

import random
from pathlib import Path

import models
import numpy as np
import peft
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from twins import CONFIG, base, trained, twins

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*deprecated")]

SPECIAL = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]
WORDS = [f"w{number}" for number in range(models.VOCABULARY - len(SPECIAL))]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
LOGGED = ("loss", "eval_loss", "entropy", "mean_token_accuracy", "rewards/chosen", "rewards/margins", "logps/chosen")


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    made.chat_template = TEMPLATE
    return made


def conversations(count: int) -> Dataset:
    rng = random.Random(count)
    turns = [(_say(rng, 3 + number % 3), _say(rng, 4 + number % 2)) for number in range(count)]
    rows = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in turns]
    return Dataset.from_list([{"messages": row} for row in rows])


def preferences(count: int) -> Dataset:
    rng = random.Random(count)
    rows = [(_say(rng, 3 + number % 2) + " ", _say(rng, 4), _say(rng, 3)) for number in range(count)]
    return Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row)) for row in rows])


def _say(rng: random.Random, length: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(length))


def options(folder: Path, **more):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_length": 32,
        "max_steps": 4,
        "logging_steps": 1,
        "save_steps": 2,
        "learning_rate": 2e-2,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "seed": 5,
        "disable_tqdm": True,
    }
    return {**settings, **more}


def sft(model, folder: Path, **more) -> trl.SFTTrainer:
    config = trl.SFTConfig(**options(folder, **more))
    rows, unseen = conversations(12), conversations(4)
    return trl.SFTTrainer(model, config, train_dataset=rows, eval_dataset=unseen, processing_class=tokenizer())


def dpo(model, folder: Path, **more) -> trl.DPOTrainer:
    config = trl.DPOConfig(**options(folder, **more))
    return trl.DPOTrainer(model, args=config, train_dataset=preferences(12), processing_class=tokenizer())


def logged(trainer) -> dict[str, list[float]]:
    history = trainer.state.log_history
    return {key: [log[key] for log in history if key in log] for key in LOGGED if any(key in log for log in history)}


def assert_equal_runs(mine, other, expected: set[str]) -> None:
    first, second = logged(mine), logged(other)
    assert first.keys() == second.keys() >= expected
    for key, values in first.items():
        np.testing.assert_allclose(values, second[key], rtol=1e-4, atol=2e-5, err_msg=key)


def test_sft_trains_as_peft_does(tmp_path):
    """With checkpointed layers in training, and evaluation without."""
    ours, theirs = twins(tmp_path)
    more = {"eval_strategy": "steps", "eval_steps": 2, "gradient_checkpointing": True}
    runs = [sft(model, tmp_path / name, **more) for name, model in (("ours", ours), ("theirs", theirs))]
    for run in runs:
        run.train()
    assert_equal_runs(*runs, {"loss", "entropy", "mean_token_accuracy"})
    assert len(set(logged(runs[0])["loss"])) == 4
    calls = ours.explain().calls
    assert all(call.served_by == "graph" for call in calls)
    kinds = {call.title.partition(",")[0] for call in calls}
    assert len(kinds) == 2  # each for batches with padding, without, or both
    assert len(calls) <= 2 * len(kinds)
    saved = [load_file(tmp_path / name / "checkpoint-2/adapter_model.safetensors") for name in ("ours", "theirs")]
    assert saved[0].keys() == saved[1].keys()
    for key, value in saved[0].items():
        torch.testing.assert_close(value, saved[1][key], rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("as_shipped")
def test_sft_leaves_generation_and_other_calls_with_the_adapter(tmp_path):
    ours, theirs = twins(tmp_path)
    inputs = models.call("llama")
    plain = ours.eval()(**inputs).loss.item()
    sft(ours, tmp_path / "run")  # puts a forward of trl's own on the model
    assert ours.eval()(**inputs).loss.item() == plain == pytest.approx(theirs.eval()(**inputs).loss.item())
    with ours.disable_adapter():
        assert ours(**inputs).loss.item() == pytest.approx(base()(**inputs).loss.item()) != plain
    fused = ours(**inputs, fused_lm_head=True)
    assert fused.loss.item() == pytest.approx(plain, rel=1e-5) and not hasattr(fused, "logits")
    merged = ours.merge_and_unload()
    assert "forward" not in vars(merged) and merged(**inputs).loss.item() == pytest.approx(plain, rel=1e-4)


def test_sft_refuses_a_second_config_and_takes_one_for_a_plain_model(tmp_path):
    ours, _ = twins(tmp_path)
    config, rows = peft.LoraConfig(**CONFIG), conversations(4)
    arguments = trl.SFTConfig(**options(tmp_path / "run"))
    with pytest.raises(ValueError, match="together with a `peft_config`"):
        trl.SFTTrainer(ours, arguments, train_dataset=rows, processing_class=tokenizer(), peft_config=config)
    other = trl.SFTTrainer(
        ours.unload(), arguments, train_dataset=rows, processing_class=tokenizer(), peft_config=config
    )
    assert type(other.model) is peft.PeftModel  # trl calls PEFT itself, and what it makes is PEFT's


def assert_dpo_trains_as_peft_does(folder: Path, **more) -> tuple[torch.nn.Module, trl.DPOTrainer]:
    """Train both; what lorafx has trained, and its trainer."""
    ours, theirs = twins(folder)
    start = trained(ours)
    mine, other = (dpo(model, folder / name, **more) for name, model in (("ours", ours), ("theirs", theirs)))
    assert mine.ref_model is None and list(ours.peft_config) == ["default", "ref"]
    for run in (mine, other):
        run.train()
    assert_equal_runs(mine, other, {"loss", "rewards/chosen", "rewards/margins", "logps/chosen"})
    assert logged(mine)["loss"][0] == pytest.approx(np.log(2), abs=1e-6)  # the reference is the adapter as it was
    for name, value in start.items():
        assert torch.equal(ours.get_parameter(name.replace(".default.", ".ref.")), value)
        assert not torch.equal(ours.get_parameter(name), value)
    assert ours.active_adapters == ["default"] and all(".default." in name for name in trained(ours))
    return ours, mine


@pytest.mark.usefixtures("as_shipped")
def test_dpo_trains_with_rewards_of_the_reference_that_were_computed_before(tmp_path):
    assert_dpo_trains_as_peft_does(tmp_path, precompute_ref_log_probs=True)


def test_dpo_goes_on_from_a_checkpoint_with_its_reference(tmp_path):
    ours, whole = assert_dpo_trains_as_peft_does(tmp_path, gradient_checkpointing=True)
    assert len(ours.explain().calls) <= 4  # of each of the two adapters, with padding and without
    again, _ = twins(tmp_path / "again")
    half = dpo(again, tmp_path / "half", gradient_checkpointing=True)
    half.train(resume_from_checkpoint=str(tmp_path / "ours/checkpoint-2"))
    assert logged(half)["loss"] == logged(whole)["loss"]
    assert again.active_adapters == ["default"]
    assert all(torch.equal(again.get_parameter(name), value) for name, value in trained(ours).items())
