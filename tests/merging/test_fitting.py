"""fitting: which class of model a checkpoint is for, and how transformers would tie it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from merges_on_disk import adapter_folder, base_folder, loaded, merge, quietly
from safetensors.torch import load_file, save_file

from lorafx.errors import CheckpointError
from lorafx.files import checkpoint
from lorafx.files.base import read_base
from lorafx.merging.fitting import Fitted, fitted


def fit(base: Path, *adapters: Path, dtype: torch.dtype | None = None) -> Fitted:
    return quietly(fitted, read_base(base), [checkpoint.read(folder) for folder in adapters], dtype)


def set_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def base(tmp_path):
    return base_folder(tmp_path, models.llama(num_hidden_layers=1, num_labels=3))


@pytest.mark.parametrize(
    ("cls", "task"),
    [
        (transformers.LlamaForCausalLM, "CAUSAL_LM"),
        (transformers.LlamaForSequenceClassification, "SEQ_CLS"),
        (transformers.LlamaForTokenClassification, "TOKEN_CLS"),
        (transformers.LlamaForQuestionAnswering, "QUESTION_ANS"),
        (transformers.LlamaModel, "FEATURE_EXTRACTION"),
        (transformers.LlamaForSequenceClassification, None),
    ],
)
def test_the_class_is_the_adapters(base, cls, task):
    saved = ["norm"] if task else ["score"]  # without a task the class is the one that the file names
    adapter = adapter_folder(base, cls, target_modules=["q_proj"], task_type=task, modules_to_save=saved)
    found = fit(base, adapter)
    assert type(found.model) is cls and all(tensor.is_meta for tensor in found.model.state_dict().values())
    assert len(found.adapters[0].adapter.selection) == 1


def test_the_checkpoints_own_class_goes_first(base):
    adapter = adapter_folder(base, transformers.LlamaForCausalLM, target_modules=["q_proj"], task_type="CAUSAL_LM")
    set_json(adapter / "adapter_config.json", task_type="FEATURE_EXTRACTION")
    assert type(fit(base, adapter).model) is transformers.LlamaForCausalLM


def test_parameters_are_of_the_dtype_that_is_asked_for(base):
    adapter = adapter_folder(base, transformers.LlamaForCausalLM, target_modules=["q_proj"])
    found = fit(base, adapter, dtype=torch.bfloat16)
    assert found.model.lm_head.weight.dtype == torch.bfloat16 and torch.get_default_dtype() == torch.float32


def test_an_error_is_about_the_checkpoints_own_class(base):
    adapter = adapter_folder(base, transformers.LlamaForCausalLM, target_modules=["q_proj"])
    set_json(adapter / "adapter_config.json", task_type="SEQ_CLS", target_modules=["k_proj"])
    with pytest.raises(CheckpointError, match=r"lacks 2 keys that the config asks for.*k_proj"):
        fit(base, adapter)
    assert torch.get_default_dtype() == torch.float32


def test_a_config_that_makes_no_model_is_refused(base):
    adapter = adapter_folder(base, transformers.LlamaForCausalLM, target_modules=["q_proj"])
    set_json(base / "config.json", hidden_act="none of these")
    with pytest.raises(CheckpointError, match=r"makes no LlamaForCausalLM: .*none of these"):
        fit(base, adapter)


@pytest.mark.parametrize("same", [True, False], ids=["the same", "different"])
def test_ends_of_a_tie_that_are_both_stored_are_one_if_they_are_the_same(tmp_path, same):
    cls = transformers.LlamaForCausalLM
    base = base_folder(tmp_path, models.llama(num_hidden_layers=1, tie_word_embeddings=True), shard="1GB")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * (1 if same else 2)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    adapter = adapter_folder(base, cls, target_modules=["lm_head"])
    model = fit(base, adapter).model
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is same
    like = loaded(base, cls)
    assert (like.lm_head.weight is like.model.embed_tokens.weight) is same
    merge(base, adapter, tmp_path / "out")
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(out["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"]) is not same
    assert torch.equal(out["lm_head.weight"], out["model.embed_tokens.weight"]) is same
