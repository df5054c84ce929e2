"""Merging on disk that is refused, interrupted or begun anew, and the command: one error and no file, or all of it."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from merges_on_disk import (
    adapter_folder,
    base_folder,
    contents,
    merge,
)
from safetensors.torch import load_file, save_file

from lorafx.__main__ import main
from lorafx.errors import AdapterError, CheckpointError, ConfigError, MergeError, SelectionError
from lorafx.merging import streaming

# --- refused, before a byte is written -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair_once(tmp_path_factory):
    place = tmp_path_factory.mktemp("pair")
    base = base_folder(place, models.llama(num_hidden_layers=1))
    return base, adapter_folder(base, transformers.LlamaForCausalLM, target_modules=["q_proj"])


@pytest.fixture
def pair(tmp_path, pair_once):
    """A base and an adapter that fits it, the test's own."""
    return tuple(Path(shutil.copytree(each, tmp_path / name)) for each, name in zip(pair_once, ("base", "adapter")))


def set_config(folder: Path, **values: Any) -> None:
    file = folder / ("adapter_config.json" if folder.name == "adapter" else "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def assert_refused(error: type[Exception], words: str, base: Any, adapter: Any, out: Path, **how: Any) -> None:
    with pytest.raises(error, match=words):
        merge(base, adapter, out, **how)
    assert [file.name for file in out.parent.iterdir() if "out" in file.name] == []


def test_an_adapter_that_does_not_fit_is_refused(tmp_path, pair):
    base, adapter = pair
    set_config(adapter, r=5)
    assert_refused(CheckpointError, r"lora_A\.weight is \(4, 48\).*`r`", base, adapter, tmp_path / "out")
    set_config(adapter, r=4, target_modules=["query"])
    assert_refused(SelectionError, "query", base, adapter, tmp_path / "out")
    set_config(adapter, target_modules=["q_proj", "v_proj"])
    assert_refused(CheckpointError, "lacks 2 keys", base, adapter, tmp_path / "out")
    set_config(adapter, target_modules=["q_proj"], megatron_config={"fp16": True})
    assert_refused(ConfigError, "megatron_config", base, adapter, tmp_path / "out")
    set_config(adapter, megatron_config=None, init_lora_weights="pissa")
    assert_refused(MergeError, "took start values out of the base", base, adapter, tmp_path / "out")


def test_an_adapter_of_a_larger_model_is_refused(tmp_path, pair):
    base, _ = pair
    other = base_folder(tmp_path / "other", models.llama(num_hidden_layers=1, hidden_size=64))
    adapter = adapter_folder(other, transformers.LlamaForCausalLM, target_modules=["q_proj"])
    assert_refused(CheckpointError, r"\(4, 64\), and the model needs \(4, 48\)", base, adapter, tmp_path / "out")


def test_two_adapters_with_a_copy_of_one_tensor_are_refused(tmp_path, pair):
    base, _ = pair
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    adapters = [adapter_folder(base, transformers.LlamaForCausalLM, seed, **settings) for seed in (1, 2)]
    assert_refused(AdapterError, r"each has its own lm_head\.weight", base, adapters, tmp_path / "out")


def test_a_base_that_is_none_is_refused(tmp_path, pair):
    base, adapter = pair
    out = tmp_path / "out"
    assert_refused(CheckpointError, "is an adapter's folder; the base model comes first", adapter, base, out)
    set_config(base, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert_refused(CheckpointError, "quantised .bitsandbytes.*original checkpoint", base, adapter, out)
    set_config(base, quantization_config=None, architectures=["LlamaOfMyOwn"])
    set_config(adapter, auto_mapping=None)
    assert_refused(CheckpointError, "no class of transformers .*LlamaOfMyOwn", base, adapter, out)
    set_config(base, architectures=["LlamaForCausalLM"], model_type="of my own")
    assert_refused(CheckpointError, "no config that transformers can read", base, adapter, out)
    (base / "config.json").write_text("{")
    assert_refused(CheckpointError, "cannot be read as JSON", base, adapter, out)


def test_a_checkpoint_that_is_not_the_configs_is_refused(tmp_path, pair):
    base, adapter = pair
    set_config(base, num_attention_heads=8)
    assert_refused(CheckpointError, r"\(64, 4\), and the model needs \(128, 4\)", base, adapter, tmp_path / "out")
    set_config(base, num_attention_heads=4)
    file = next(file for file in base.glob("*.safetensors") if any("q_proj" in key for key in load_file(file)))
    tensors = {k: t[:, :40].contiguous() if "q_proj" in k else t for k, t in load_file(file).items()}
    save_file(tensors, file)
    assert_refused(
        CheckpointError, r"q_proj.weight is \(64, 40\), and the config makes", base, adapter, tmp_path / "out"
    )


def test_weights_that_are_stored_as_no_usual_floats_are_refused(tmp_path, pair):
    base, adapter = pair
    file = next(file for file in base.glob("*.safetensors") if any("q_proj" in key for key in load_file(file)))
    save_file({k: t.to(torch.float8_e4m3fn) if "q_proj" in k else t for k, t in load_file(file).items()}, file)
    assert_refused(MergeError, "q_proj.weight is stored as F8_E4M3", base, adapter, tmp_path / "out")


def test_a_weight_that_the_checkpoint_lacks_is_refused(tmp_path, pair):
    base, adapter = pair
    file = next(file for file in base.glob("*.safetensors") if any("q_proj" in key for key in load_file(file)))
    save_file({key: tensor for key, tensor in load_file(file).items() if "q_proj" not in key}, file)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"] = {key: name for key, name in index["weight_map"].items() if "q_proj" not in key}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(
        CheckpointError, "has no .*q_proj.weight, which the adapter changes", base, adapter, tmp_path / "out"
    )


def test_options_that_are_none_are_refused(tmp_path, pair):
    base, adapter = pair
    assert_refused(ConfigError, "dtype='int8' is none of float32", base, adapter, tmp_path / "out", dtype="int8")
    assert_refused(ConfigError, "no adapter", base, [], tmp_path / "out")
    assert_refused(CheckpointError, "adapter_config.json does not exist", base, tmp_path, tmp_path / "out")


def test_a_folder_that_is_there_stays_as_it_is(tmp_path, pair):
    base, adapter = pair
    before = contents(base)
    for out in (base, base / "config.json"):
        with pytest.raises(CheckpointError, match="is there already"):
            merge(base, adapter, out)
    assert contents(base) == before
    (tmp_path / "empty").mkdir()
    merge(base, adapter, tmp_path / "empty")
    merge(base, adapter, tmp_path / "new" / "deep" / "out")
    assert contents(tmp_path / "empty") == contents(tmp_path / "new" / "deep" / "out")


# --- interrupted -----------------------------------------------------------------------------------------------------


def test_a_merge_that_was_cut_short_goes_on_where_it_was(tmp_path, pair, monkeypatch):
    base, adapter = pair
    written: list[str] = []
    whole = streaming.shards.write

    def write(file: Path, *args: Any) -> None:
        written.append(file.name)
        if len(written) == 3:
            file.write_bytes(b"half")
            raise KeyboardInterrupt
        whole(file, *args)

    monkeypatch.setattr(streaming.shards, "write", write)
    with pytest.raises(KeyboardInterrupt):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists() and len(written) == 3
    merge(base, adapter, tmp_path / "out")
    count = len(list(base.glob("*.safetensors")))
    assert count > 3 and len(written) == count + 1 and len(set(written)) == count
    merge(base, adapter, tmp_path / "again")
    assert contents(tmp_path / "out") == contents(tmp_path / "again")
    assert {file.name for file in tmp_path.iterdir()} == {"base", "adapter", "out", "again"}


@pytest.mark.parametrize("other", ["adapter", "base", "dtype"])
def test_what_was_begun_with_something_else_is_begun_anew(tmp_path, pair, monkeypatch, other):
    base, adapter = pair
    whole, calls = streaming.shards.write, iter(range(100))

    def write(*args: Any) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt
        whole(*args)

    monkeypatch.setattr(streaming.shards, "write", write)
    with pytest.raises(KeyboardInterrupt):
        merge(base, adapter, tmp_path / "out")
    if other == "adapter":
        adapter = adapter_folder(base, transformers.LlamaForCausalLM, seed=9, target_modules=["q_proj"])
    if other == "base":
        for file in base.glob("*.safetensors"):
            save_file({key: 2 * tensor for key, tensor in load_file(file).items()}, file, {"format": "pt"})
    how = {"dtype": "bfloat16"} if other == "dtype" else {}
    merge(base, adapter, tmp_path / "out", **how)
    merge(base, adapter, tmp_path / "expected", **how)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal_and_nowhere_else(tmp_path, pair, monkeypatch, terminal):
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    monkeypatch.setattr(sys, "stderr", Stream())
    merge(*pair, tmp_path / "out")
    shown = sys.stderr.getvalue()
    assert "merging: 100%" in shown if terminal else shown == ""


# --- the command -----------------------------------------------------------------------------------------------------


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "lorafx", "merge", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True)


@pytest.mark.slow
def test_the_command_merges_and_says_no_more_than_where(tmp_path, pair, capsys):
    base, adapter = pair
    done = command(base, adapter, "-o", tmp_path / "out", "--dtype", "bfloat16")
    assert (done.returncode, done.stdout) == (0, f"merged into {tmp_path / 'out'}\n")
    assert "merg" not in done.stderr and "%" not in done.stderr
    merge(base, adapter, tmp_path / "twin", dtype="bfloat16")
    assert contents(tmp_path / "out") == contents(tmp_path / "twin")
    assert main(["merge", str(base), str(adapter), "-o", str(tmp_path / "out")]) == 1
    refused = capsys.readouterr()
    error = f"merge: {tmp_path / 'out'} is there already; delete it first, or choose another name"
    assert refused.out == "" and refused.err.splitlines()[-1] == error
