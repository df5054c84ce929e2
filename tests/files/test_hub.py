"""Adapters to and from the Hub: the real `huggingface_hub` client against a server on loopback."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import hub_server
import huggingface_hub
import models
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from safetensors.torch import load_file
from torch import nn

import lorafx
from lorafx.errors import CheckpointError, ConfigError
from lorafx.files.checkpoint import CONFIG, OLD_WEIGHTS, WEIGHTS
from lorafx.files.model_card import CARD
from lorafx.testing import adapter_tensors, assert_same_tensors

REPO, FILE = "somebody/adapter", "/{repo_id}/resolve/{revision}/{filename}"


def base_model() -> nn.Module:
    return models.llama(num_hidden_layers=1)


def adapted(**settings: Any) -> lorafx.AdaptedModel:
    config = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False} | settings
    return lorafx.compile(base_model(), config, random_state=1)


def load(source: str | Path = REPO, **how: Any) -> lorafx.AdaptedModel:
    return lorafx.load(base_model(), source, **how)


def assert_same_adapters(a: lorafx.AdaptedModel, b: lorafx.AdaptedModel, name: str = "default") -> None:
    assert_same_tensors(adapter_tensors(a, name), adapter_tensors(b, name))


def assert_refused(*words: str, source: str | Path = REPO, **how: Any) -> None:
    """Loading is one `CheckpointError` with these words, and leaves a base and an adapted model as they were."""
    base = base_model()
    flags = [p.requires_grad for p in base.parameters()]
    with pytest.raises(CheckpointError) as caught:
        lorafx.load(base, source, **how)
    for word in words:
        assert word in str(caught.value)
    assert flags == [p.requires_grad for p in base.parameters()]
    lora = adapted()
    with pytest.raises(CheckpointError):
        lora.load_adapter(source, "other", **how)
    assert list(lora.peft_config) == ["default"]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """The files of a good adapter."""
    adapted().save_pretrained(tmp_path / "saved")
    return {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()}


# --- reading ---------------------------------------------------------------------------------------------------------


def test_an_id_loads_what_the_folder_loads_and_fetches_nothing_else(hub, files, tmp_path):
    hub.add(REPO, {**files, "model.safetensors": b"large", "optimizer.pt": b"large"})
    lora = load()
    assert_same_adapters(lora, load(tmp_path / "saved"))
    fetched = {path.rpartition("/")[2] for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path}
    assert fetched == {CONFIG, WEIGHTS}


def test_a_revision_and_a_subfolder_are_found(hub, files):
    repository = hub.add(REPO, {})
    repository.branches["v1"] = repository.commit({f"deep/er/{name}": content for name, content in files.items()})
    repository.commit({f"deep/er/{CONFIG}": b"broken later"})
    assert_same_adapters(load(revision="v1", subfolder="deep/er"), adapted())
    assert_refused(CONFIG, "JSON", subfolder="deep/er")


def test_all_files_are_of_one_commit(hub, files, monkeypatch):
    repository = hub.add(REPO, files)
    first = lorafx.files.hub.Source._file

    def file_then_push(self, *args):
        found = first(self, *args)
        repository.commit({WEIGHTS: b"of another training run"})
        return found

    monkeypatch.setattr(lorafx.files.hub.Source, "_file", file_then_push)
    assert_same_adapters(load(), adapted())


def test_a_subfolder_of_a_local_folder_is_found(tmp_path, files):
    assert_same_adapters(load(tmp_path, subfolder="saved"), adapted())
    lora = adapted()
    lora.load_adapter(tmp_path, "other", subfolder="saved")
    assert list(lora.peft_config) == ["default", "other"]
    assert_refused("nowhere", source=tmp_path, subfolder="nowhere")


@pytest.mark.parametrize("subfolder", ["../saved", "..", "saved/../../x", "/etc", "..\\saved", "C:/saved", 5, b"saved"])
def test_a_subfolder_that_leads_out_of_the_folder_is_refused(tmp_path, hub, files, subfolder):
    hub.add(REPO, files)
    for source in (tmp_path, tmp_path / "saved", REPO):
        for read in (lorafx.load, lorafx.PeftModel.from_pretrained):
            with pytest.raises(ConfigError, match="subfolder"):
                read(base_model(), source, subfolder=subfolder)
        with pytest.raises(ConfigError, match="subfolder"):
            lorafx.PeftConfig.from_pretrained(source, subfolder=subfolder)
    assert not hub.requests


def test_an_old_weights_file_is_fetched_where_there_is_no_new_one(hub, files, tmp_path):
    torch.save(load_file(tmp_path / "saved" / WEIGHTS), tmp_path / OLD_WEIGHTS)
    hub.add(REPO, {CONFIG: files[CONFIG], OLD_WEIGHTS: (tmp_path / OLD_WEIGHTS).read_bytes()})
    assert_refused("pickle")
    assert_same_adapters(load(weights_only=True), adapted())


@pytest.mark.slow
def test_the_cache_is_where_it_was_asked_to_be_and_serves_when_the_hub_is_gone(hub, files, tmp_path, monkeypatch):
    hub.add(REPO, files)
    load(cache_dir=tmp_path / "mine")
    assert list((tmp_path / "mine").rglob(WEIGHTS))
    assert not (tmp_path / "cache").exists()
    asked = len(hub.requests)
    assert_same_adapters(load(cache_dir=tmp_path / "mine", local_files_only=True), adapted())
    assert len(hub.requests) == asked
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"http://127.0.0.1:9{FILE}")
    assert_same_adapters(load(cache_dir=tmp_path / "mine"), adapted())
    assert_refused("out of reach", "onnection refused")
    assert_refused("not in the cache", local_files_only=True)


def test_offline_mode_is_named(hub, files, monkeypatch):
    hub.add(REPO, files)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    assert_refused(REPO, "not in the cache")


def test_the_token_is_sent(hub, files):
    hub.add(REPO, files, token="secret")
    assert_refused(REPO, "needs a `token`")
    assert_same_adapters(load(token="secret"), adapted())
    assert hub.asked("GET", WEIGHTS)[-1]["authorization"] == "Bearer secret"


def test_what_is_missing_is_one_clear_error(hub, files, tmp_path):
    hub.add("a/gated", files, token="secret", gated=True)
    hub.add("a/bare", {CONFIG: files[CONFIG]})
    hub.add(REPO, files)
    assert_refused("a/missing", "no such repository", source="a/missing")
    assert_refused("a/gated", "gated; ask for access", source="a/gated")
    assert_refused("a/bare", "no such file", WEIGHTS, source="a/bare")
    assert_refused(REPO, "revision v9", "no such revision", revision="v9")
    assert_refused(REPO, "subfolder nowhere", "no such file", CONFIG, subfolder="nowhere")
    assert_refused("no/such/folder", "is no folder here", "no id of a repository", source="./no/such/folder")
    with pytest.raises(ConfigError, match="no option revison"):
        load(tmp_path / "saved", revison="v1")


def test_what_is_like_a_folder_here_is_not_asked_of_the_hub(hub, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub.add("runs/best", files)
    (tmp_path / "runs" / "best-lora").mkdir(parents=True)
    assert_refused("runs/bst-lora is no folder here; nearest: runs/best-lora", source="runs/bst-lora")
    assert_refused("runs/best is no folder here; runs/ holds best-lora", "give its `revision`", source="runs/best")
    assert_refused("nowhere is no folder here; an id is owner/name", "give its `revision`", source="nowhere")
    assert_refused("nearest: saved", source="savd")
    assert not hub.requests
    assert_same_adapters(load("runs/best", revision="main"), load(tmp_path / "saved"))


def test_old_weights_never_stand_in_for_new_ones_that_are_out_of_reach(hub, files):
    hub.add(REPO, {**files, OLD_WEIGHTS: b"older"})
    hub.broken.add(WEIGHTS)
    assert_refused("out of reach", "500", weights_only=True)
    assert not hub.asked("HEAD", OLD_WEIGHTS)


def test_pefts_names_reach_the_hub_too(hub, files):
    hub.add(REPO, {f"deep/{name}": content for name, content in files.items()})
    assert lorafx.PeftConfig.from_pretrained(REPO, "deep").r == 4
    assert not hub.asked("HEAD", WEIGHTS)
    assert_same_adapters(lorafx.PeftModel.from_pretrained(base_model(), REPO, subfolder="deep"), adapted())


def test_a_download_that_breaks_off_is_resumed(hub, files, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
    hub.add(REPO, files)
    hub.drops[WEIGHTS] = 2
    assert_same_adapters(load(), adapted())
    assert ["range" in headers for headers in hub.asked("GET", WEIGHTS)] == [False, True, True]


def test_a_download_that_never_completes_is_one_error_and_the_next_try_is_clean(hub, files):
    hub.add(REPO, files)
    hub.drops[WEIGHTS] = 1000
    assert_refused(REPO, WEIGHTS)
    hub.drops.clear()
    assert_same_adapters(load(), adapted())


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_push_and_a_load_give_the_adapter_back(files, tmp_path):
    """In a process that knows the Hub by HF_ENDPOINT alone."""
    lines = [
        "import sys; sys.path[:0] = ['tests', 'tests/files']; import test_hub as t",
        "t.adapted().push_to_hub(t.REPO, token='secret', commit_message='Hello')",
        "t.load(token='secret').save_pretrained(sys.argv[1])",
    ]
    with hub_server.running() as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        command = [sys.executable, "-c", "\n".join(lines), str(tmp_path / "loaded")]
        root = Path(__file__).parents[2]
        done = subprocess.run(command, env=os.environ | settings | quiet, capture_output=True, text=True, cwd=root)
        assert done.returncode == 0, done.stderr[-2000:]
        assert hub.repositories[REPO].messages[-1]["summary"] == "Hello"
        assert {headers.get("authorization") for headers in hub.asked("POST")} == {"Bearer secret"}
    assert (tmp_path / "loaded" / WEIGHTS).read_bytes() == files[WEIGHTS]


def test_pushed_files_are_those_that_saving_writes(hub, files):
    commit = adapted().push_to_hub(REPO, private=True)
    repository = hub.repositories[REPO]
    assert repository.commits[repository.branches["main"]] == files
    assert repository.private
    assert commit.oid == repository.branches["main"]
    assert_same_adapters(load(), adapted())


@pytest.mark.slow
def test_branches_pull_requests_and_selected_adapters(hub):
    lora = adapted()
    lora.add_adapter("other", {"r": 2, "target_modules": ["v_proj"], "init_lora_weights": False})
    lora.push_to_hub(REPO, revision="v1", selected_adapters=["other"])
    lora.push_to_hub(REPO, create_pr=True, commit_message="Look", commit_description="at this")
    repository = hub.repositories[REPO]
    assert set(repository.branches) == {"main", "v1", "refs/pr/1"}
    assert repository.commits[repository.branches["main"]] == {}
    assert f"other/{WEIGHTS}" in repository.commits[repository.branches["v1"]]
    assert repository.messages[-1]["description"] == "at this"
    assert_same_adapters(load(revision="refs/pr/1"), lora)
    loaded = load(revision="v1", subfolder="other", adapter_name="other")
    assert_same_adapters(loaded, lora, "other")


@pytest.mark.slow
def test_a_card_is_written_once_with_tags_and_never_over_the_users(hub):
    adapted().push_to_hub(REPO, tags=["mine"])
    repository = hub.repositories[REPO]
    card = huggingface_hub.ModelCard(repository.commits[repository.branches["main"]][CARD].decode())
    assert set(card.data.tags) >= {"lora", "mine"}
    repository.commit({CARD: b"my own words"})
    adapted(lora_alpha=3).push_to_hub(REPO)
    now = repository.commits[repository.branches["main"]]
    assert now[CARD] == b"my own words"
    assert b'"lora_alpha": 3' in now[CONFIG]


def test_a_push_that_fails_is_one_clear_error(hub, monkeypatch):
    hub.add(REPO, {}, token="secret")
    with pytest.raises(CheckpointError, match=f"{REPO} cannot be written"):
        adapted().push_to_hub(REPO)
    with pytest.raises(CheckpointError, match="create_pr"):
        adapted().push_to_hub(REPO, revision="v1", create_pr=True, token="secret")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="onnection refused"):
        adapted().push_to_hub(REPO)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError, match="safe_serialization"):
            adapted().push_to_hub(REPO, safe_serialization=False)
