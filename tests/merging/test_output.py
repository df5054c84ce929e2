"""output: where each tensor of a merged checkpoint comes from, and what cannot be written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from merges_on_disk import adapter_folder, base_folder, quietly, tensors_of
from torch import nn

from lorafx.errors import CheckpointError, MergeError
from lorafx.files import checkpoint
from lorafx.files.base import read_base
from lorafx.merging.fitting import fitted
from lorafx.merging.output import Output
from lorafx.torch_private.loading import Conversion

SIZES = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1, "num_attention_heads": 4}


def output(place: Path, model: nn.Module, dtype: torch.dtype | None = None, **settings: Any) -> Output:
    base = base_folder(place, model)
    adapter = adapter_folder(base, type(model), **settings)
    source, found = read_base(base), [checkpoint.read(adapter)]
    return quietly(lambda: Output(source, fitted(source, found, dtype), dtype))


def qwen3_moe() -> nn.Module:
    settings = {"vocab_size": 90, "num_key_value_heads": 2, "num_experts": 3, "moe_intermediate_size": 40}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **settings))


def data(plan: Output, name: str, key: str) -> bytes:
    return b"".join(plan.files[name][key].data())


def test_what_no_adapter_changes_is_copied(tmp_path):
    plan = output(tmp_path, models.llama(num_hidden_layers=1), target_modules=["q_proj"])
    assert plan.files.keys() == plan.base.shards.keys() and plan.added == {} and not plan.is_untied
    for name, shard in plan.base.shards.items():
        assert {key: piece.entry for key, piece in plan.files[name].items()} == shard.entries
        changed = [k for k in shard.entries if data(plan, name, k) != b"".join(shard.chunks(k))]
        assert changed == [k for k in shard.entries if "q_proj" in k]


def test_a_conversion_is_made_once_for_all_of_its_tensors(tmp_path, monkeypatch):
    plan = output(tmp_path, qwen3_moe(), target_modules=["q_proj"], modules_to_save=["mlp"])
    made: list[str] = []
    load = Conversion.loaded
    monkeypatch.setattr(Conversion, "loaded", lambda self, stored: made.append(self.name) or load(self, stored))
    for name, pieces in plan.files.items():
        for key in sorted(pieces):
            data(plan, name, key)
    experts = [key for key in plan.entries if ".experts." in key]
    assert len(experts) == 9 and experts == [key for key in plan.entries if key in plan.conversions]
    assert sorted(made) == ["model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.experts.gate_up_proj"]


def test_experts_are_cast_like_all_else(tmp_path):
    plan = output(tmp_path, qwen3_moe(), torch.bfloat16, target_modules=["q_proj"], modules_to_save=["mlp"])
    for name, pieces in plan.files.items():
        for key, piece in pieces.items():
            assert piece.entry.dtype == "BF16" and len(data(plan, name, key)) == piece.entry.nbytes


def test_a_conversion_that_cannot_be_undone_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Conversion, "stored", lambda self, loaded: dict(loaded))
    with pytest.raises(MergeError, match=r"makes .*down_proj of .*, and that cannot be undone; merge in memory"):
        output(tmp_path / "a", qwen3_moe(), target_modules=["q_proj"], modules_to_save=["mlp"])
    output(tmp_path / "b", qwen3_moe(), target_modules=["q_proj"])  # its experts are copied


def test_experts_of_other_shapes_are_refused(tmp_path):
    model = qwen3_moe()
    base = base_folder(tmp_path, model)
    adapter = adapter_folder(base, type(model), target_modules=["q_proj"], modules_to_save=["mlp"])
    source, found = read_base(base), [checkpoint.read(adapter)]
    key = next(key for key in source.entries if "experts.1.down_proj" in key)
    entries = source.shard_of(key).entries
    entries[key] = type(entries[key])("F32", (47, 40), 47 * 40 * 4)
    with pytest.raises(CheckpointError, match="down_proj cannot be made"):
        quietly(lambda: Output(source, fitted(source, found, None), None))


def test_a_new_tensor_is_of_the_dtype_of_most(tmp_path):
    base = base_folder(tmp_path, models.llama(num_labels=3), torch.bfloat16)
    cls = transformers.LlamaForSequenceClassification
    adapter = adapter_folder(base, cls, target_modules=["q_proj"], task_type="SEQ_CLS")
    source, found = read_base(base), [checkpoint.read(adapter)]
    for dtype, name in ((None, "BF16"), (torch.float32, "F32")):
        plan = quietly(lambda wide: Output(source, fitted(source, found, wide), wide), dtype)
        assert {key: piece.entry.dtype for key, piece in plan.added.items()} == {"score.weight": name}
        assert "score.weight" in plan.files[max(source.shards)] and "score.weight" not in tensors_of(base)
