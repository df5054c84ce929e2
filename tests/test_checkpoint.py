"""Saving and loading: what lies in a folder, what it gives back, and that a damaged one is one clear error."""

from __future__ import annotations

import json
import os
import re
import struct
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorafx
from lorafx.checkpoint import CARD, CONFIG, OLD_WEIGHTS, WEIGHTS
from lorafx.config import NOT_YET
from lorafx.errors import CheckpointError, ConfigError, LorafxError
from lorafx.testing import adapter_tensors, assert_same_tensors, same_bits

PREFIX = "base_model.model."
SITE = "model.layers.0.self_attn.q_proj"
A_KEY, B_KEY = f"{PREFIX}{SITE}.lora_A.weight", f"{PREFIX}{SITE}.lora_B.weight"
SETTINGS: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "down_proj"],
    "modules_to_save": ["norm"],
    "init_lora_weights": False,
}


def base_model(**overrides: Any) -> nn.Module:
    return models.llama(num_hidden_layers=1, **overrides)


def adapted(base: nn.Module | None = None, **settings: Any) -> lorafx.AdaptedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lorafx.compile(base or base_model(), SETTINGS | settings, random_state=1)


def load(folder: Path, base: nn.Module | None = None, **how: Any) -> lorafx.AdaptedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lorafx.load(base or base_model(), folder, **how)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a good adapter."""
    folder = tmp_path / "adapter"
    adapted().save_pretrained(folder)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


def set_config(folder: Path, **values: Any) -> None:
    (folder / CONFIG).write_text(json.dumps(config_of(folder) | values))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


def set_tensors(folder: Path, **changes: Tensor | None) -> None:
    """Write the folder's weights again with some tensors replaced, added, or (None) left out."""
    tensors = {**tensors_of(folder), **changes}
    save_file({key: t.contiguous() for key, t in tensors.items() if t is not None}, folder / WEIGHTS)


def to_pickle(folder: Path) -> None:
    torch.save(tensors_of(folder), folder / OLD_WEIGHTS)
    (folder / WEIGHTS).unlink()


# --- what is written -------------------------------------------------------------------------------------------------


def test_the_files_are_those_of_peft(saved: Path) -> None:
    assert {file.name for file in saved.iterdir()} == {CONFIG, WEIGHTS, CARD}
    header = json.loads((saved / WEIGHTS).read_bytes()[8:].split(b"}}")[0] + b"}}")
    assert header["__metadata__"] == {"format": "pt"}
    assert (saved / CONFIG).read_text().startswith('{\n  "')


def test_every_key_has_pefts_prefix_and_no_adapter_name(saved: Path) -> None:
    keys = tensors_of(saved)
    assert all(key.startswith(PREFIX) and ".default" not in key for key in keys)
    assert {A_KEY, B_KEY, f"{PREFIX}model.norm.weight"} <= keys.keys()


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    lora = adapted()
    lora.save_pretrained(tmp_path / "a")
    lora.save_pretrained(tmp_path / "b")
    for name in (CONFIG, WEIGHTS, CARD):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_config_says_inference_and_the_model_class(saved: Path) -> None:
    config = config_of(saved)
    assert config["inference_mode"] is True
    assert config["auto_mapping"]["base_model_class"] == "LlamaForCausalLM"
    assert "extra" not in config and "runtime_config" not in config
    assert sorted(config["target_modules"]) == ["down_proj", "q_proj"]


def test_all_linear_is_written_as_names(tmp_path: Path) -> None:
    adapted(target_modules="all-linear").save_pretrained(tmp_path)
    names = config_of(tmp_path)["target_modules"]
    assert SITE in names and "lm_head" not in names and len(names) == 7


def test_several_adapters_go_to_subfolders(tmp_path: Path) -> None:
    lora = adapted()
    lora.add_adapter("second", SETTINGS | {"r": 2})
    lora.save_pretrained(tmp_path)
    assert (tmp_path / CARD).exists() and not (tmp_path / "second" / CARD).exists()
    assert tensors_of(tmp_path)[A_KEY].shape[0] == 4
    assert tensors_of(tmp_path / "second")[A_KEY].shape[0] == 2


def test_only_selected_adapters_are_written(tmp_path: Path) -> None:
    lora = adapted()
    lora.add_adapter("second", SETTINGS | {"r": 2})
    lora.save_pretrained(tmp_path, selected_adapters=["second"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["second"]


def test_an_unknown_selected_adapter_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(lorafx.errors.AdapterError, match="nobody"):
        adapted().save_pretrained(tmp_path / "new", selected_adapters=["default", "nobody"])
    assert not (tmp_path / "new").exists()


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path / "new", is_main_process=False)
    assert not (tmp_path / "new").exists()


def test_a_pickle_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="safe_serialization"):
        adapted().save_pretrained(tmp_path / "new", safe_serialization=False)
    assert not (tmp_path / "new").exists()


def test_a_readme_of_the_user_stays(saved: Path) -> None:
    (saved / CARD).write_text("mine")
    adapted(r=2).save_pretrained(saved)
    assert (saved / CARD).read_text() == "mine"


def test_what_is_saved_while_merged_is_what_is_saved_unmerged(tmp_path: Path) -> None:
    lora = adapted(target_modules=["embed_tokens", "q_proj"])
    lora.save_pretrained(tmp_path / "plain")
    lora.merge_adapter()
    lora.save_pretrained(tmp_path / "merged")
    assert (tmp_path / "plain" / WEIGHTS).read_bytes() == (tmp_path / "merged" / WEIGHTS).read_bytes()


# --- what comes back -------------------------------------------------------------------------------------------------


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

EMBEDDINGS = {f"{PREFIX}model.embed_tokens.weight", f"{PREFIX}lm_head.weight"}


def extra_keys(folder: Path) -> set[str]:
    return {key for key in tensors_of(folder) if ".lora_" not in key and "norm" not in key}


@pytest.mark.parametrize(("wanted", "expected"), [(True, EMBEDDINGS), (False, set()), ("auto", set())])
def test_embeddings_are_saved_on_request(tmp_path: Path, wanted: bool | str, expected: set[str]) -> None:
    adapted().save_pretrained(tmp_path, save_embedding_layers=wanted)
    assert extra_keys(tmp_path) == expected


@pytest.mark.parametrize(("wanted", "saves"), [(True, True), (False, False), ("auto", True)])
def test_adapted_embeddings_are_saved_unless_refused(tmp_path: Path, wanted: bool | str, saves: bool) -> None:
    adapted(target_modules=["embed_tokens", "q_proj"]).save_pretrained(tmp_path, save_embedding_layers=wanted)
    assert extra_keys(tmp_path) == ({f"{PREFIX}model.embed_tokens.base_layer.weight"} if saves else set())


def test_saved_embeddings_come_back_into_the_base(tmp_path: Path) -> None:
    base = base_model()
    adapted(base).save_pretrained(tmp_path, save_embedding_layers=True)
    other = base_model(seed=9)
    load(tmp_path, other)
    assert same_bits(other.model.embed_tokens.weight, base.model.embed_tokens.weight)
    assert same_bits(other.lm_head.weight, base.lm_head.weight)


def test_a_resized_vocabulary_is_saved_by_itself(tmp_path: Path) -> None:
    lora = adapted()
    lora.resize_token_embeddings(models.VOCABULARY + 6)
    lora.save_pretrained(tmp_path)
    assert extra_keys(tmp_path) == EMBEDDINGS
    base = base_model()
    with pytest.raises(CheckpointError, match="resize_token_embeddings") as caught:
        load(tmp_path, base)
    assert str(tmp_path / WEIGHTS) in str(caught.value)
    base.resize_token_embeddings(models.VOCABULARY + 6)
    again = load(tmp_path, base)
    assert same_bits(again.model.embed_tokens.weight, lora.model.embed_tokens.weight)


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
    (saved / OLD_WEIGHTS).write_bytes(b"not a pickle at all")
    load(saved)


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


ASKED = {
    "megatron_config": {"a": 1},
    "trainable_token_indices": [1, 2],
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 2.0},
    "corda_config": {"corda_method": "ipm"},
    "lora_ga_config": {"direction": "ArBr"},
    "use_dora": True,
    "velora_config": {"num_groups": 2},
    "alora_invocation_tokens": [3],
    "use_qalora": True,
    "monteclora_config": {"num_experts": 2},
    "layer_replication": [[0, 1], [0, 1]],
    "target_parameters": ["experts.down_proj"],
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 1.0},
    "ensure_weight_tying": True,
    "init_lora_weights": "pissa",
    "peft_type": "LOHA",
}


def test_every_field_that_is_not_implemented_is_in_the_table() -> None:
    assert set(NOT_YET) <= set(ASKED)


@pytest.mark.parametrize("field", ASKED)
def test_a_field_that_is_not_implemented_is_refused_by_compile(field: str) -> None:
    base = base_model()
    before = State.of(base)
    with pytest.raises(ConfigError, match=field):
        lorafx.compile(base, SETTINGS | {field: ASKED[field]})
    before.check(base)


# --- damage ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """What must not change about a model: its tensors, flags and modes, and what modules it has."""

    tensors: Mapping[str, Tensor]
    identities: Mapping[str, int]
    trainable: Mapping[str, bool]
    modes: Mapping[str, bool]

    @classmethod
    def of(cls, model: nn.Module) -> State:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        return cls(
            {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
            {name: id(parameter) for name, parameter in parameters.items()},
            {name: parameter.requires_grad for name, parameter in parameters.items()},
            {name: module.training for name, module in model.named_modules()},
        )

    def check(self, model: nn.Module) -> None:
        now = State.of(model)
        assert_same_tensors(now.tensors, self.tensors)
        assert (now.identities, now.trainable, now.modes) == (self.identities, self.trainable, self.modes)


def edited(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return damage


def with_tensor(key: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[Path], None]:
    return lambda folder: set_tensors(folder, **{key: change(tensors_of(folder)[key])})


def with_new(key: str, shape: tuple[int, ...]) -> Callable[[Path], None]:
    return lambda folder: set_tensors(folder, **{key: torch.zeros(shape)})


def with_field(**values: Any) -> Callable[[Path], None]:
    return lambda folder: set_config(folder, **values)


def without_field(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps({k: v for k, v in config_of(folder).items() if k != name}))

    return damage


def missing(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def a_folder_instead(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def one_value(tensor: Tensor, value: float) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[-1] = value
    return changed


SAVED_KEY = f"{PREFIX}model.norm.weight"
NEW_KEY = f"{PREFIX}model.layers.7.self_attn.q_proj.lora_A.weight"

DAMAGED_WEIGHTS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    **{f"cut to {n} bytes": (edited(WEIGHTS, lambda b, n=n: b[:n]), ()) for n in (0, 1, 7, 8, 9, 100, 1000)},
    **{f"cut by {n} bytes": (edited(WEIGHTS, lambda b, n=n: b[:-n]), ()) for n in (1, 4, 3000)},
    "longer": (edited(WEIGHTS, lambda b: b + b"\0"), ()),
    "no safetensors": (edited(WEIGHTS, lambda b: b"PK\x03\x04 this is something else" * 40), ()),
    "huge header": (edited(WEIGHTS, lambda b: struct.pack("<Q", 2**60) + b[8:]), ()),
    "header no JSON": (edited(WEIGHTS, lambda b: b[:8] + b"x" + b[9:]), ()),
    "missing file": (missing(WEIGHTS), ()),
    "a folder": (a_folder_instead(WEIGHTS), ()),
    "no tensors": (lambda folder: save_file({}, folder / WEIGHTS), (A_KEY,)),
    "NaN": (with_tensor(B_KEY, lambda t: one_value(t, float("nan"))), (B_KEY,)),
    "infinity": (with_tensor(A_KEY, lambda t: one_value(t, -float("inf"))), (A_KEY,)),
    "NaN in a saved module": (with_tensor(SAVED_KEY, lambda t: one_value(t, float("nan"))), (SAVED_KEY,)),
    "missing key": (with_tensor(B_KEY, lambda t: None), (B_KEY,)),
    "missing saved module": (with_tensor(SAVED_KEY, lambda t: None), (SAVED_KEY,)),
    "unexpected site": (with_new(NEW_KEY, (4, 48)), (NEW_KEY,)),
    "unexpected suffix": (with_new(f"{PREFIX}{SITE}.lora_B.bias", (64,)), (f"{PREFIX}{SITE}.lora_B.bias",)),
    "unexpected base weight": (with_new(f"{PREFIX}{SITE}.weight", (64, 48)), (f"{PREFIX}{SITE}.weight",)),
    "key without prefix": (with_new(f"{SITE}.lora_A.weight", (4, 48)), (f"{SITE}.lora_A.weight",)),
    "wrong shape": (with_tensor(A_KEY, lambda t: t[:, :-1]), (A_KEY,)),
    "transposed": (with_tensor(B_KEY, lambda t: t.t()), (B_KEY,)),
    "flattened": (with_tensor(B_KEY, lambda t: t.flatten()), (B_KEY,)),
    "a scalar": (with_tensor(B_KEY, lambda t: t[0, 0]), (B_KEY,)),
    "empty": (with_tensor(B_KEY, lambda t: t[:0]), (B_KEY,)),
    "wrong rank": (with_tensor(A_KEY, lambda t: t[:2]), (A_KEY,)),
    "wrong shape of a saved module": (with_tensor(SAVED_KEY, lambda t: t[:-1]), (SAVED_KEY,)),
    "integers": (with_tensor(A_KEY, lambda t: t.to(torch.int32)), (A_KEY,)),
    "booleans": (with_tensor(B_KEY, lambda t: t > 0), (B_KEY,)),
    "complex": (with_tensor(B_KEY, lambda t: t.to(torch.complex64)), (B_KEY,)),
    "integers in a saved module": (with_tensor(SAVED_KEY, lambda t: t.to(torch.int64)), (SAVED_KEY,)),
    "wrong embedding shape": (
        with_new(f"{PREFIX}model.embed_tokens.weight", (3, 48)),
        ("model.embed_tokens.weight",),
    ),
    "wrong embedding dtype": (
        lambda folder: set_tensors(
            folder, **{f"{PREFIX}lm_head.weight": torch.ones(models.VOCABULARY, 48, dtype=torch.int32)}
        ),
        ("lm_head.weight",),
    ),
}

DAMAGED_CONFIGS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "missing file": (missing(CONFIG), ()),
    "a folder": (a_folder_instead(CONFIG), ()),
    "empty": (edited(CONFIG, lambda b: b""), ()),
    "cut": (edited(CONFIG, lambda b: b[: len(b) // 2]), ()),
    "no JSON": (edited(CONFIG, lambda b: b"r = 4\n"), ()),
    "no text": (edited(CONFIG, lambda b: b"\xff\xfe\x00\x01"), ()),
    "too deep": (edited(CONFIG, lambda b: b"[" * 100_000), ()),
    "a list": (edited(CONFIG, lambda b: b"[" + b + b"]"), ()),
    "null": (edited(CONFIG, lambda b: b"null"), ()),
    "no peft_type": (without_field("peft_type"), ("peft_type",)),
    "unknown site": (with_field(target_modules=["q_porj"]), ("target_modules",)),
    "other rank": (with_field(r=8), (A_KEY,)),
    "other rank pattern": (with_field(rank_pattern={"down_proj": 3}), ("down_proj.lora_A.weight",)),
    "unknown module to save": (with_field(modules_to_save=["nrom"]), ("modules_to_save",)),
    **{f"asks {field}": (with_field(**{field: value}), (field,)) for field, value in ASKED.items()},
}

NAN, INFINITY = float("nan"), float("inf")
WRONG_VALUES: list[tuple[str, Any]] = [
    *[("r", value) for value in ("8", 0, -1, 2.5, True, None, [4])],
    *[("lora_alpha", value) for value in ("16", None, True, NAN, INFINITY)],
    *[("lora_dropout", value) for value in ("0", 1.5, -0.1, None, NAN)],
    *[("bias", value) for value in ("some", None, True)],
    *[("target_modules", value) for value in (5, [1], {"q_proj": 1}, [["q_proj"]], "(", "*_proj", True)],
    *[("exclude_modules", value) for value in (3, [None], "(", {"a": 1})],
    *[("layers_to_transform", value) for value in ("1", [0.5], [True], {"0": 1}, [None])],
    *[("rank_pattern", value) for value in ([1], "q_proj", {"q_proj": "4"}, {"q_proj": 0}, {"(": 2})],
    *[("alpha_pattern", value) for value in ([1], {"q_proj": None}, {"q_proj": NAN}, {"(": 2})],
    *[("modules_to_save", value) for value in ("norm", [1], 7, ["norm", "("])],
    *[("init_lora_weights", value) for value in (3, None, ["gaussian"])],
    *[(name, "yes") for name in ("use_rslora", "lora_bias", "fan_in_fan_out", "inference_mode", "use_dora")],
    *[("peft_type", value) for value in (3, None, ["LORA"], "", "lora")],
    *[(name, 5) for name in ("task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version")],
]


def assert_one_error(folder: Path, file: str, named: tuple[str, ...], **how: Any) -> None:
    """Loading is one error that names the file and these, and base and adapted models are as they were."""
    base, other = base_model(), adapted()
    base.model.norm.weight.requires_grad_(False)
    base.model.layers[0].eval()
    before, other_before, names = State.of(base), State.of(other), list(other.peft_config)
    for attempt in (
        lambda: lorafx.load(base, folder, **how),
        lambda: lorafx.load(base, folder, is_trainable=True, **how),
        lambda: other.load_adapter(folder, "second", **how),
    ):
        with warnings.catch_warnings(), pytest.raises(LorafxError) as caught:
            warnings.simplefilter("ignore")
            attempt()
        before.check(base)
        other_before.check(other)
        assert list(other.peft_config) == names and other.active_adapters == ["default"]
        for part in (str(folder / file), *named):
            assert part in str(caught.value)


@pytest.mark.parametrize("what", DAMAGED_WEIGHTS)
def test_damaged_weights_are_one_error_and_change_nothing(saved: Path, what: str) -> None:
    damage, named = DAMAGED_WEIGHTS[what]
    damage(saved)
    assert_one_error(saved, WEIGHTS, named)


@pytest.mark.parametrize("what", DAMAGED_CONFIGS)
def test_damaged_configs_are_one_error_and_change_nothing(saved: Path, what: str) -> None:
    damage, named = DAMAGED_CONFIGS[what]
    damage(saved)
    assert_one_error(saved, WEIGHTS if what.startswith("other rank") else CONFIG, named)


@pytest.mark.parametrize(("field", "value"), WRONG_VALUES, ids=str)
def test_a_config_value_that_makes_no_sense_is_one_error_and_changes_nothing(
    saved: Path, field: str, value: Any
) -> None:
    set_config(saved, **{field: value})
    assert_one_error(saved, CONFIG, (field,))


def test_a_layers_pattern_that_is_no_regex_is_one_error(saved: Path) -> None:
    set_config(saved, layers_pattern="(", layers_to_transform=[0])
    assert_one_error(saved, CONFIG, ("layers_pattern",))


@pytest.mark.parametrize(
    "content",
    [b"", b"not a pickle", {A_KEY: 3}, [1, 2], {1: torch.ones(2)}, {A_KEY: {"nested": torch.ones(2)}}],
    ids=["empty", "text", "number", "list", "number as key", "nested"],
)
def test_damaged_pickles_are_one_error_and_change_nothing(saved: Path, content: Any) -> None:
    to_pickle(saved)
    if isinstance(content, bytes):
        (saved / OLD_WEIGHTS).write_bytes(content)
    else:
        torch.save(content, saved / OLD_WEIGHTS)
    assert_one_error(saved, OLD_WEIGHTS, (), weights_only=True)


@pytest.mark.parametrize("length", [10, 200, 2000])
def test_cut_pickles_are_one_error_and_change_nothing(saved: Path, length: int) -> None:
    to_pickle(saved)
    edited(OLD_WEIGHTS, lambda data: data[:length])(saved)
    assert_one_error(saved, OLD_WEIGHTS, (), weights_only=True)


def test_float8_tensors_load_as_in_peft(saved: Path) -> None:
    expected = tensors_of(saved)[A_KEY].to(torch.float8_e4m3fn)
    set_tensors(saved, **{A_KEY: expected})
    weight = dict(load(saved).named_parameters())[f"{SITE}.lora_A.default.weight"]
    assert same_bits(weight, expected.to(torch.float32))


def test_a_folder_that_does_not_exist_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        lorafx.load(base_model(), tmp_path / "nowhere")


def test_a_config_of_the_users_own_must_fit_the_file(saved: Path) -> None:
    base = base_model()
    before = State.of(base)
    with pytest.raises(LorafxError, match=re.escape(str(saved / WEIGHTS))):
        lorafx.load(base, saved, config=SETTINGS | {"r": 7})
    before.check(base)


@pytest.mark.parametrize("name", ["", "a.b", "forward", "a/b", "/a"])
def test_a_name_that_cannot_be_used_changes_nothing(saved: Path, name: str) -> None:
    lora = load(saved, is_trainable=True)
    before = State.of(lora)
    with pytest.raises(LorafxError):
        lora.load_adapter(saved, name)
    before.check(lora)
    assert list(lora.peft_config) == ["default"]


@pytest.mark.parametrize("name", ["weight", "lora_A", "base_layer", "modules_to_save", "bias", "0", "a b"])
def test_a_name_that_looks_like_something_else_works(tmp_path: Path, name: str) -> None:
    lora = adapted()
    lora.add_adapter(name, SETTINGS | {"r": 2})
    lora.save_pretrained(tmp_path)
    again = load(tmp_path)
    again.load_adapter(tmp_path / name, name)
    assert_same_tensors(adapter_tensors(again, name), adapter_tensors(lora, name))
    assert_same_tensors(adapter_tensors(again), adapter_tensors(lora))


def test_the_wrong_model_is_one_error_naming_the_file(saved: Path) -> None:
    base = base_model(hidden_size=32)
    before = State.of(base)
    with pytest.raises(CheckpointError, match=re.escape(str(saved / WEIGHTS))):
        lorafx.load(base, saved)
    before.check(base)


@pytest.mark.parametrize("n", [1, 3])
def test_a_failure_while_tensors_are_hung_in_changes_nothing(
    saved: Path, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    base, calls, real = base_model(), [0], lorafx.adapter.attach

    def attach(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == n:
            raise MemoryError("injected")
        real(*args)

    lora = load(saved, is_trainable=True)
    before, lora_before = State.of(base), State.of(lora)
    monkeypatch.setattr(lorafx.adapter, "attach", attach)
    for attempt in (lambda: lorafx.load(base, saved), lambda: lora.load_adapter(saved, "second")):
        calls[0] = 0
        with pytest.raises(MemoryError):
            attempt()
    before.check(base)
    lora_before.check(lora)
    assert list(lora.peft_config) == ["default"]
