"""save_pretrained: what lies in a folder afterwards."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path

import models
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
    tensors_of,
)
from graphs import Chain
from huggingface_hub import ModelCard
from torch import nn

import lorafx
from lorafx.errors import AdapterError, CheckpointError
from lorafx.files.checkpoint import CONFIG, WEIGHTS, keys
from lorafx.files.model_card import CARD
from lorafx.testing import same_bits

EMBEDDINGS = {f"{PREFIX}model.embed_tokens.weight", f"{PREFIX}lm_head.weight"}


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


@pytest.mark.parametrize("targets", ["all-linear", None])
def test_names_that_are_written_leave_out_what_other_fields_ask_for(tmp_path: Path, targets: str | None) -> None:
    lora = adapted(target_modules=targets, trainable_token_indices=[3, 1])
    lora.save_pretrained(tmp_path)
    assert not any("embed" in name for name in config_of(tmp_path)["target_modules"])
    lora.load_adapter(tmp_path, "again")
    assert set(lora.adapter_state_dict("again")) == set(lora.adapter_state_dict("default"))


def test_the_architectures_default_is_written_as_names(tmp_path: Path) -> None:
    adapted(target_modules=None).save_pretrained(tmp_path)
    assert config_of(tmp_path)["target_modules"] == [SITE, SITE.replace("q_proj", "v_proj")]


def test_values_that_are_given_may_lie_in_memory_in_any_order(tmp_path: Path) -> None:
    lora = adapted()
    path = f"{SITE}.lora_A.default.weight"
    value = torch.randn(lora.get_parameter(path).shape[::-1]).t()
    lora.save_pretrained(tmp_path, state_dict=lora.state_dict() | {path: value})
    assert torch.equal(tensors_of(tmp_path)[A_KEY], value)


# What a state dict's names may be: a function of the model's own name, and of the key in a file.
NAMES = {
    "as they are": lambda path, key: path,
    "compiled": lambda path, key: f"_orig_mod.{path}",
    "replicated": lambda path, key: f"module.{path}",
    "compiled and replicated": lambda path, key: f"module._orig_mod.{path}",
    "layers compiled": lambda path, key: path.replace("layers.0.", "layers.0._orig_mod."),
    "sharded": lambda path, key: f"_fsdp_wrapped_module.{path.replace('layers.0.', 'layers.0._fsdp_wrapped_module.')}",
    "checkpointed": lambda path, key: path.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
    "PEFT's": lambda path, key: f"{PREFIX}{path}",
    "a file's": lambda path, key: key,
    "a file's, replicated": lambda path, key: f"module.{key}",
}


@pytest.mark.parametrize("names", NAMES)
def test_values_that_are_given_are_written_whatever_a_wrapper_calls_them(tmp_path: Path, names: str) -> None:
    lora = adapted()
    own = {path: key for key, path in keys(lora._lorafx.adapters["default"]).items()}
    state = {
        NAMES[names](path, own.get(path, f"{PREFIX}{path}")): torch.full_like(value, 7 + (path in own))
        for path, value in lora.state_dict().items()
        if not (names.startswith("a file's") and f"{PREFIX}{path}" in own.values())  # the base's own, in no such dict
    }
    lora.save_pretrained(tmp_path, state_dict=state, save_embedding_layers=True)
    for key, value in tensors_of(tmp_path).items():
        assert (value == (7 if key in EMBEDDINGS else 8)).all(), key


@pytest.mark.parametrize("given", ["nothing", "one missing", "another model's"])
def test_a_state_dict_without_the_adapters_parameters_is_refused(tmp_path: Path, given: str) -> None:
    lora = adapted()
    path = f"{SITE}.lora_B.default.weight"
    states = {
        "nothing": {},
        "one missing": {name: value for name, value in lora.state_dict().items() if name != path},
        "another model's": {f"inner.{name}": value for name, value in lora.state_dict().items()},
    }
    with pytest.raises(CheckpointError, match=r"no value for .*lora_"):
        lora.save_pretrained(tmp_path / "new", state_dict=states[given])
    assert not (tmp_path / "new").exists()


def test_a_file_s_keys_are_refused_where_two_adapters_could_be_meant(tmp_path: Path) -> None:
    lora = adapted()
    lora.add_adapter("second", SETTINGS)
    lora.save_pretrained(tmp_path / "a", selected_adapters=["second"])
    state = tensors_of(tmp_path / "a" / "second")
    with pytest.raises(CheckpointError, match="does not say whose"):
        lora.save_pretrained(tmp_path / "b", state_dict=state)
    assert not (tmp_path / "b").exists()
    lora.save_pretrained(tmp_path / "b", selected_adapters=["default"], state_dict=state)
    assert (tmp_path / "b" / WEIGHTS).read_bytes() == (tmp_path / "a" / "second" / WEIGHTS).read_bytes()


def test_several_adapters_go_to_subfolders(tmp_path: Path) -> None:
    lora = adapted()
    lora.add_adapter("second", SETTINGS | {"r": 2})
    lora.save_pretrained(tmp_path)
    assert (tmp_path / CARD).exists() and not (tmp_path / "second" / CARD).exists()
    assert tensors_of(tmp_path)[A_KEY].shape[0] == 4
    assert tensors_of(tmp_path / "second")[A_KEY].shape[0] == 2


def test_a_model_whose_adapters_are_gone_saves_nothing_and_says_so(tmp_path: Path) -> None:
    lora = lorafx.compile(Chain(), {"target_modules": ["first"], "r": 2})
    lora.merge_and_unload()
    with pytest.raises(AdapterError, match="no adapter to save"):
        lora.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


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


@pytest.mark.parametrize(
    ("written", "kept"),
    [("mine", {}), ("---\nlicense: mit\ntags:\n- lora\n- my-tag\n---\nmine", {"license": "mit"})],
)
def test_a_readme_of_the_user_s_stays_and_says_what_it_is_of(saved: Path, written: str, kept: dict) -> None:
    (saved / CARD).write_text(written)
    for _ in range(2):
        adapted(r=2).save_pretrained(saved)
        card = ModelCard.load(saved / CARD)
        data = card.data.to_dict()
        assert card.text.strip() == "mine" and data["library_name"] == "peft" and kept.items() <= data.items()
        assert sorted(data["tags"]) == sorted({"lora", "lorafx", *(["my-tag"] if kept else [])})


@pytest.mark.parametrize("written", [b"---\nlicense: [\n---\nmine", b"\xff\xfe"])
def test_a_readme_that_cannot_be_read_stays_as_it_is(saved: Path, written: bytes) -> None:
    (saved / CARD).write_bytes(written)
    with contextlib.nullcontext() if written[:1] == b"\xff" else pytest.warns(UserWarning, match="cannot be read"):
        adapted(r=2).save_pretrained(saved)
    assert (saved / CARD).read_bytes() == written


def test_what_is_saved_besides_the_adapter_is_said(tmp_path: Path) -> None:
    lora = adapted(target_modules=["embed_tokens", "q_proj"])
    with pytest.warns(UserWarning, match=r"model.embed_tokens.weight: saved along with 'default', being adapted"):
        lora.save_pretrained(tmp_path)
    plain = lorafx.compile(nn.Sequential(nn.Embedding(9, 4)), {"target_modules": ["0"]})
    with pytest.warns(UserWarning, match="saves none"):
        plain.save_pretrained(tmp_path / "plain", save_embedding_layers=True)


def test_what_trains_and_is_not_saved_is_said(tmp_path: Path) -> None:
    lora = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])
    lora.save_pretrained(tmp_path)
    lora.get_parameter("model.norm.weight").requires_grad_()
    lora.get_input_embeddings().weight.requires_grad_()
    with pytest.warns(UserWarning, match=r"^model.embed_tokens.weight and 1 more of the base may train, .* alone"):
        lora.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"^model.norm.weight of the base may train"):
        lora.save_pretrained(tmp_path, save_embedding_layers=True)


def test_what_is_saved_while_merged_is_what_is_saved_unmerged(tmp_path: Path) -> None:
    lora = adapted(target_modules=["embed_tokens", "q_proj"])
    lora.save_pretrained(tmp_path / "plain")
    lora.merge_adapter()
    lora.save_pretrained(tmp_path / "merged")
    assert (tmp_path / "plain" / WEIGHTS).read_bytes() == (tmp_path / "merged" / WEIGHTS).read_bytes()


def extra_keys(folder: Path) -> set[str]:
    return {key for key in tensors_of(folder) if ".lora_" not in key and "norm" not in key}


@pytest.mark.parametrize(("wanted", "expected"), [(True, EMBEDDINGS), (False, set()), ("auto", set())])
def test_embeddings_are_saved_on_request(tmp_path: Path, wanted: bool | str, expected: set[str]) -> None:
    adapted().save_pretrained(tmp_path, save_embedding_layers=wanted)
    assert extra_keys(tmp_path) == expected


class Wte(Chain):
    """A model whose adapted embeddings have a name for which PEFT does not write their base weights."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name
        setattr(self, name, torch.nn.Embedding(11, 6))
        self.head = torch.nn.Linear(6, 11)

    def get_input_embeddings(self):
        return getattr(self, self.name)

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        return self.head(getattr(self, self.name)(ids))


@pytest.mark.parametrize("name", ["wte", "embed_tokens"])
@pytest.mark.parametrize("wanted", [True, False, "auto"])
def test_the_keys_of_adapted_embeddings_are_those_of_peft(tmp_path: Path, name: str, wanted: bool | str) -> None:
    base, ids = Wte(name), torch.arange(5)
    lora = lorafx.compile(base, {"r": 2, "target_modules": [name], "init_lora_weights": False})
    lora.save_pretrained(tmp_path / "ours", save_embedding_layers=wanted)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    assert not peft.set_peft_model_state_dict(theirs, tensors_of(tmp_path / "ours")).unexpected_keys
    torch.testing.assert_close(theirs(ids), lora(ids))
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=wanted)
    assert tensors_of(tmp_path / "ours").keys() == tensors_of(tmp_path / "theirs").keys()


@pytest.mark.parametrize(("wanted", "saves"), [(True, True), (False, False), ("auto", True)])
def test_adapted_embeddings_are_saved_unless_refused(tmp_path: Path, wanted: bool | str, saves: bool) -> None:
    adapted(target_modules=["embed_tokens", "q_proj"]).save_pretrained(tmp_path, save_embedding_layers=wanted)
    assert extra_keys(tmp_path) == ({f"{PREFIX}model.embed_tokens.base_layer.weight"} if saves else set())


def test_embeddings_that_an_adapter_trains_as_a_whole_are_its_own(tmp_path: Path) -> None:
    lora = adapted(modules_to_save=["lm_head"])
    own = lora.get_parameter("lm_head.modules_to_save.default.weight")
    own.data.add_(1)
    lora.save_pretrained(tmp_path, save_embedding_layers=True)
    assert extra_keys(tmp_path) == EMBEDDINGS
    assert same_bits(tensors_of(tmp_path)[f"{PREFIX}lm_head.weight"], own)


def test_saved_embeddings_come_back_into_the_base(tmp_path: Path) -> None:
    base = base_model()
    adapted(base).save_pretrained(tmp_path, save_embedding_layers=True)
    other = base_model(seed=9)
    load(tmp_path, other)
    assert same_bits(other.model.embed_tokens.weight, base.model.embed_tokens.weight)
    assert same_bits(other.lm_head.weight, base.lm_head.weight)


def test_an_adapter_that_is_added_brings_its_embeddings_along(tmp_path: Path) -> None:
    base, other = base_model(), base_model(seed=9)
    adapted(base).save_pretrained(tmp_path, save_embedding_layers=True)
    adapted(other).load_adapter(tmp_path, "second")
    assert same_bits(other.model.embed_tokens.weight, base.model.embed_tokens.weight)


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


def test_a_model_whose_embeddings_cannot_be_asked_for_is_saved(tmp_path):
    """As transformers' vision and audio models: they have the getters, which raise."""

    class Chain2(Chain):
        def get_input_embeddings(self):
            raise NotImplementedError("no embeddings")

    lora = lorafx.compile(Chain2(), {"r": 2, "target_modules": ["first"], "init_lora_weights": False})
    lora.save_pretrained(tmp_path)
    x, fresh = torch.randn(5, 4), Chain2()
    fresh.load_state_dict({name: lora.get_parameter(name) for name in Chain().state_dict()})
    assert torch.equal(lorafx.load(fresh, tmp_path)(x), lora.eval()(x))
