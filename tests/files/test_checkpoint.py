"""Saving and loading: what lies in a folder, and what it gives back."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from checkpoints import (
    A_KEY,
    B_KEY,
    PREFIX,
    SETTINGS,
    SITE,
    adapted,
    base_model,
    config_of,
    load,
    set_config,
    set_tensors,
    tensors_of,
    to_pickle,
)
from safetensors.torch import load_file
from torch import Tensor, nn

import lorafx
from lorafx.errors import CheckpointError, ConfigError
from lorafx.files.checkpoint import CONFIG, OLD_WEIGHTS, WEIGHTS
from lorafx.testing import adapter_tensors, assert_same_tensors, same_bits

# --- what is written -------------------------------------------------------------------------------------------------


# --- what comes back -------------------------------------------------------------------------------------------------


def test_an_embedding_of_trained_rows_that_an_old_folder_lists_as_a_target_is_none(tmp_path: Path) -> None:
    lora = adapted(trainable_token_indices=[3, 1], modules_to_save=None)
    lora.save_pretrained(tmp_path)
    targets = [*config_of(tmp_path)["target_modules"], "model.embed_tokens"]
    set_config(tmp_path, target_modules=targets)
    again = load(tmp_path)
    assert_same_tensors(adapter_tensors(again), adapter_tensors(lora))
    assert "model.embed_tokens" not in again.peft_config["default"].target_modules
    set_tensors(tmp_path, **{f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.ones(4, 48)})
    with pytest.raises(ConfigError, match="embed_tokens is in `target_modules` and in `trainable_token_indices`"):
        load(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bias": "all", "lora_bias": True},
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "use_rslora": True},
        {"rank_pattern": {"self_attn.q_proj": 1, "q_proj": 2}, "alpha_pattern": {"mlp.down_proj": 5, "down_proj": 7}},
        {"target_modules": ["embed_tokens", "lm_head"], "modules_to_save": None},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
    ],
    ids=str,
)
def test_every_tensor_comes_back_bit_for_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    lora = adapted(base_model(attention_bias=True), **settings)
    lora.save_pretrained(tmp_path)
    again = load(tmp_path, base_model(attention_bias=True))
    assert_same_tensors(adapter_tensors(again), adapter_tensors(lora))
    again.save_pretrained(tmp_path / "again")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


class Ending(nn.Module):
    """(n) ids -> (n, 4), by a linear layer and an embedding; the name of the one ends in that of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 4)
        self.inner = nn.ModuleDict({"proj": nn.Embedding(11, 6), "proj2": nn.Linear(6, 6)})

    def forward(self, ids: Tensor) -> Tensor:
        return self.proj(self.inner["proj2"](self.inner["proj"](ids)))


class Layered(nn.Module):
    """(n) ids -> (n, 4), by an embedding and two linear layers, whose numbered names end the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.model = self.numbered(nn.Linear(6, 6), nn.Linear(6, 4))
        self.first = nn.ModuleDict({"model": self.numbered(nn.Embedding(11, 6))})

    @staticmethod
    def numbered(*layers: nn.Module) -> nn.ModuleDict:
        return nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"proj": layer}) for layer in layers)})

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.first["model"]["layers"][0]["proj"](ids)  # type: ignore[index]
        for layer in self.model["layers"]:  # type: ignore[union-attr]
            hidden = layer["proj"](hidden)
        return hidden


@pytest.mark.parametrize(
    ("base", "layers", "written"),
    [(Ending(), None, r"inner\.proj2|proj"), (Layered(), [0], r"model\.layers\.0\.proj")],
    ids=["any layer", "one layer"],
)
def test_all_linear_comes_back_though_another_name_ends_like_a_sites(
    tmp_path: Path, base: nn.Module, layers: list[int] | None, written: str
) -> None:
    ids, config = torch.arange(5), {"target_modules": "all-linear", "layers_to_transform": layers}
    lora = lorafx.compile(base, config | {"init_lora_weights": False}, random_state=1)
    lora.save_pretrained(tmp_path)
    assert config_of(tmp_path)["target_modules"] == written and config_of(tmp_path)["layers_to_transform"] is None
    assert_same_tensors(adapter_tensors(load(tmp_path, base)), adapter_tensors(lora))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    assert set(peft.get_peft_model_state_dict(theirs)) == set(load_file(tmp_path / WEIGHTS))
    torch.testing.assert_close(theirs(ids), lora(ids))


def test_an_adapter_may_come_back_under_another_name(saved: Path) -> None:
    lora = load(saved, adapter_name="other")
    assert lora.active_adapter == "other"
    assert set(adapter_tensors(lora, "other")) == {
        name.replace("default", "other") for name in adapter_tensors(load(saved))
    }


@pytest.mark.parametrize("trainable", [True, False])
def test_is_trainable_decides_mode_and_gradients(saved: Path, trainable: bool) -> None:
    lora = load(saved, is_trainable=trainable)
    assert any(p.requires_grad for p in lora.parameters()) is trainable
    assert lora.peft_config["default"].inference_mode is not trainable
    if not trainable:
        assert not any(module.training for module in lora.modules())


def test_the_users_base_keeps_its_mode_and_keys(saved: Path) -> None:
    base = base_model().train()
    keys = base.state_dict().keys()
    load(saved, base)
    assert base.training and all(module.training for module in base.modules())
    assert base.state_dict().keys() == keys


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_half_or_double_file_loads_as_the_models_adapters_are(saved: Path, dtype: torch.dtype) -> None:
    expected = {key: tensor.to(dtype) for key, tensor in tensors_of(saved).items()}
    set_tensors(saved, **expected)
    weight = dict(load(saved).named_parameters())[f"{SITE}.lora_A.default.weight"]
    assert same_bits(weight, expected[A_KEY].to(torch.float32))


def test_a_bfloat16_base_gets_float32_adapters_unless_told_otherwise(saved: Path) -> None:
    set_tensors(saved, **{key: tensor.bfloat16() for key, tensor in tensors_of(saved).items()})
    name = f"{SITE}.lora_A.default.weight"
    for widen, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        lora = load(saved, base_model().bfloat16(), autocast_adapter_dtype=widen)
        assert dict(lora.named_parameters())[name].dtype == dtype


def test_several_adapters_load_side_by_side(tmp_path: Path) -> None:
    lora = adapted()
    lora.add_adapter("second", SETTINGS | {"r": 2})
    lora.save_pretrained(tmp_path)
    again = load(tmp_path)
    again.load_adapter(tmp_path / "second", "second")
    for name in ("default", "second"):
        assert_same_tensors(adapter_tensors(again, name), adapter_tensors(lora, name))
    assert again.active_adapters == ["default"]


# --- embeddings and ties ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "q_proj"]], ids=str)
def test_a_tied_weight_is_read_from_pefts_file(tmp_path: Path, targets: list[str]) -> None:
    config = peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(base_model(tie_word_embeddings=True), config).save_pretrained(tmp_path)
    lora = load(tmp_path, base_model(tie_word_embeddings=True))
    expected = {key: tensor for key, tensor in tensors_of(tmp_path).items() if "lora_" in key}
    lora.save_pretrained(tmp_path / "again", save_embedding_layers=False)
    assert_same_tensors(tensors_of(tmp_path / "again"), expected)
    assert lora.lm_head.weight is lora.model.embed_tokens.weight


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_a_saved_module_whose_weight_is_tied_comes_back(tmp_path: Path, module: str) -> None:
    lora = adapted(base_model(tie_word_embeddings=True), modules_to_save=[module])
    with torch.no_grad():
        next(p for n, p in lora.named_parameters() if f"{module}.modules_to_save" in n).fill_(0.5)
    lora.save_pretrained(tmp_path)
    base = base_model(tie_word_embeddings=True)
    again = load(tmp_path, base)
    assert_same_tensors(adapter_tensors(again), adapter_tensors(lora))
    assert not (base.lm_head.weight == 0.5).any()


# --- old pickles -----------------------------------------------------------------------------------------------------


def test_a_pickle_is_refused_unless_asked_for(saved: Path) -> None:
    expected = tensors_of(saved)
    to_pickle(saved)
    with pytest.raises(CheckpointError, match="weights_only=True") as caught:
        load(saved)
    assert str(saved / OLD_WEIGHTS) in str(caught.value)
    lora = load(saved, weights_only=True)
    lora.save_pretrained(saved)
    assert not (saved / OLD_WEIGHTS).exists()
    assert_same_tensors(tensors_of(saved), expected)


def test_a_pickle_of_pefts_loads(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(base_model(), peft.LoraConfig(**SETTINGS | {"modules_to_save": ["lm_head"]}))
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / OLD_WEIGHTS).exists()
    lora = load(tmp_path, weights_only=True)
    expected = dict(theirs.named_parameters())[f"{PREFIX}{SITE}.lora_B.default.weight"]
    assert same_bits(dict(lora.named_parameters())[f"{SITE}.lora_B.default.weight"], expected)


def test_load_adapter_takes_a_pickle_only_when_asked(saved: Path) -> None:
    lora = load(saved)
    to_pickle(saved)
    with pytest.raises(CheckpointError, match="weights_only"):
        lora.load_adapter(saved, "second")
    lora.load_adapter(saved, "second", weights_only=True)
    assert list(lora.peft_config) == ["default", "second"]


def test_safetensors_win_over_a_pickle_beside_them(saved: Path) -> None:
    expected = tensors_of(saved)
    torch.save({key: torch.zeros_like(tensor) for key, tensor in expected.items()}, saved / OLD_WEIGHTS)
    for weights_only in (False, True):
        lora = load(saved, weights_only=weights_only)
        assert same_bits(lora.get_parameter(f"{SITE}.lora_B.default.weight"), expected[B_KEY])
    (saved / OLD_WEIGHTS).write_bytes(b"not a pickle at all")
    load(saved, weights_only=True)


class RunsCode:
    """What a hostile pickle holds."""

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, ("hostile-pickle-ran",)


def test_a_hostile_pickle_is_refused_and_does_not_run(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    to_pickle(saved)
    torch.save({A_KEY: RunsCode()}, saved / OLD_WEIGHTS)
    with pytest.raises(CheckpointError, match=re.escape(str(saved / OLD_WEIGHTS))):
        load(saved, weights_only=True)
    assert not Path("hostile-pickle-ran").exists()


# --- fields ----------------------------------------------------------------------------------------------------------


def test_fields_of_the_future_are_kept_with_a_warning(saved: Path, tmp_path: Path) -> None:
    future = {"use_hyper_lora": True, "hyper_config": {"depth": [1, 2]}, "extra": {"a": None}}
    set_config(saved, **future)
    with pytest.warns(UserWarning, match="use_hyper_lora"):
        lora = lorafx.load(base_model(), saved)
    lora.save_pretrained(tmp_path / "again")
    written = config_of(tmp_path / "again")
    assert {key: written.get(key) for key in future} == future


def test_known_but_idle_fields_are_written_back(saved: Path, tmp_path: Path) -> None:
    set_config(saved, megatron_core="other.core", qalora_group_size=32, revision="abc", peft_version="0.99.0")
    load(saved).save_pretrained(tmp_path / "again")
    assert config_of(tmp_path / "again") == config_of(saved)


def test_a_path_that_is_no_adapter_s_folder(tmp_path):
    lora = adapted()
    lora.add_adapter("b", lora.peft_config["default"])
    lora.add_adapter("c", lora.peft_config["default"])
    lora.save_pretrained(tmp_path / "all")
    lora.save_pretrained(tmp_path / "two", selected_adapters=["b", "c"])
    for path, said in {
        tmp_path / "all" / WEIGHTS: f"is a file; pass its folder, {tmp_path / 'all'}",
        tmp_path / "nothing": "nothing is no folder here",
        "some/where/else": "some/where/else is no folder here",
        "~/adapter": "~ is not expanded",
        tmp_path / "two": "holds adapters in b/, c/: pass one of these",
        tmp_path: "holds adapters in all/: pass one of these",
    }.items():
        with pytest.raises(CheckpointError, match=re.escape(said)):
            lorafx.load(base_model(), path)
    with pytest.raises(CheckpointError, match="there is no folder"):
        lorafx.load(base_model(), tmp_path / "all", subfolder="d")


def test_unknown_fields_of_a_file_are_kept_and_those_of_a_person_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    for version in ("99.0", None):
        values = json.loads((tmp_path / CONFIG).read_text())
        values |= {"lora_aplha": 3, "of_the_future": 1, "peft_version": version}
        values = {key: value for key, value in values.items() if value is not None or key != "peft_version"}
        (tmp_path / CONFIG).write_text(json.dumps(values))
        with pytest.warns(UserWarning, match="lora_aplha"):
            assert lorafx.load(base_model(), tmp_path).peft_config["default"].extra["of_the_future"] == 1
    with pytest.raises(ConfigError, match="no field `lora_aplha`; did you mean `lora_alpha`"):
        lorafx.compile(base_model(), {"r": 2, "lora_aplha": 3, "target_modules": ["q_proj"]})
    with pytest.raises(ConfigError, match="no field `zzz`; it has target_modules"):
        lorafx.compile(base_model(), {"zzz": 3, "target_modules": ["q_proj"]})
