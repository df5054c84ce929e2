"""The folder of a base model: what is in it, and one error for each way in which it cannot be merged onto."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorafx.errors import CheckpointError
from lorafx.files.base import CONFIG, INDEX, read_base
from lorafx.files.shards import bytes_of

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def folder(place: Path) -> Path:
    """A checkpoint in two files."""
    place.mkdir()
    save_file({"a": torch.ones(2, 3), "b": torch.ones(3)}, place / ONE)
    save_file({"c": torch.ones(4, dtype=torch.bfloat16)}, place / TWO)
    (place / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"a": ONE, "b": ONE, "c": TWO}}))
    (place / CONFIG).write_text('{"model_type": "llama"}')
    return place


@pytest.fixture
def base(tmp_path):
    return folder(tmp_path / "base")


def test_it_has_config_index_and_tensors(base):
    found = read_base(base)
    assert found.config == {"model_type": "llama"} and found.index["weight_map"]["c"] == TWO
    assert {key: entry.shape for key, entry in found.entries.items()} == {"a": (2, 3), "b": (3,), "c": (4,)}
    assert found.shard_of("c").file.name == TWO and list(found.shards) == [ONE, TWO]


def test_a_single_file_goes_before_an_index(base):
    save_file({"x": torch.ones(5)}, base / "model.safetensors")
    found = read_base(str(base))
    assert list(found.entries) == ["x"] and found.index is None
    kept, weights = found.others()
    assert kept == [] and [file.name for file in weights] == [ONE, TWO]


def refused(base: Path, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        read_base(base)


def test_what_is_no_checkpoint_of_safetensors_is_refused(base):
    (base / INDEX).unlink()
    refused(base, r"has no model\.safetensors and no .*index\.json; whatever else transformers can load")
    (base / "pytorch_model.bin").write_bytes(b"")
    refused(base, r"pytorch_model\.bin cannot be read.*save_pretrained")
    (base / "pytorch_model.bin").rename(base / "model.gguf")
    refused(base, r"there is model\.gguf, which .* has to be converted first.*save_pretrained")
    (base / CONFIG).unlink()
    refused(base, "is .*base a model's folder")
    (base / "adapter_config.json").write_text("{}")
    refused(base, "is an adapter's folder")


@pytest.mark.parametrize("settings", [{"quant_method": "gptq", "bits": 4}, {"format": "x"}, "odd"])
@pytest.mark.parametrize("name", ["quantization_config", "compression_config"])
def test_a_quantised_one_says_by_which_method(base, settings, name):
    assert read_base(base).quantised is None
    (base / CONFIG).write_text(json.dumps({name: settings}))
    assert read_base(base).quantised == ("gptq" if "bits" in settings else "see its config.json")


def test_an_index_that_does_not_agree_with_the_files_is_refused(base):
    index = json.loads((base / INDEX).read_text())

    def mapped(**changes):
        (base / INDEX).write_text(json.dumps(index | {"weight_map": index["weight_map"] | changes}))

    mapped(d=TWO)
    refused(base, f"says that d is in {TWO}, and it is not")
    mapped(d="../other.safetensors")
    refused(base, "lists '../other.safetensors', which is no .safetensors file beside it")
    mapped(d="third.safetensors")
    refused(base, r"third\.safetensors cannot be read")
    mapped()
    save_file({"a": torch.ones(2), "c": torch.ones(4)}, base / TWO)
    refused(base, f"a is in two files, {ONE} and {TWO}")
    (base / INDEX).write_text("[]")
    refused(base, "holds no JSON object")


def test_other_files_are_told_from_weights_and_hidden_ones(base):
    for name in ("tokenizer.json", "sub/deep/vocab.txt", "model.onnx", "sub/flax_model.msgpack", ".cache/x", "sub/.y"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(b"")
    kept, weights = read_base(base).others()
    assert [str(file) for file in kept] == ["tokenizer.json", "sub/deep/vocab.txt"]
    assert [str(file) for file in weights] == ["model.onnx", "sub/flax_model.msgpack"]


def test_a_repository_is_fetched_without_weights_of_other_formats(hub, base):
    files = {file.name: file.read_bytes() for file in base.iterdir()} | {"pytorch_model.bin": b"x", "vocab.txt": b"v"}
    hub.add("somebody/base", files)
    found = read_base("somebody/base")
    with pytest.raises(CheckpointError, match="cannot be had from the Hub: there is no such repository"):
        read_base("somebody/else")
    assert found.entries.keys() == {"a", "b", "c"} and found.others()[0] == [Path("vocab.txt")]
    assert not (found.folder / "pytorch_model.bin").exists()
    with pytest.raises(CheckpointError, match="no such revision"):
        read_base("somebody/base", revision="elsewhere")
    with pytest.raises(CheckpointError, match="is no folder here, and no id of a repository on the Hub either"):
        read_base("./nowhere")


def test_torchs_own_files_are_read_where_there_are_no_others(hub, base, tmp_path):
    """Under the names of safetensors, one tensor's rows at a time, without code that a pickle may hold."""
    old = tmp_path / "old"
    old.mkdir()
    one, two = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
    tensors = {"a": torch.randn(5, 3), "b": torch.randn(6, 4).t(), "c": torch.tensor(2.0, dtype=torch.bfloat16)}
    torch.save({key: tensors[key] for key in "ab"}, old / one)
    torch.save({"c": tensors["c"]}, old / two)
    listed = {"metadata": {}, "weight_map": {"a": one, "b": one, "c": two}}
    (old / "pytorch_model.bin.index.json").write_text(json.dumps(listed))
    (old / CONFIG).write_text('{"model_type": "llama"}')
    hub.add("somebody/old", {file.name: file.read_bytes() for file in old.iterdir()} | {"model.onnx": b"x"})
    for place in (old, "somebody/old"):
        found = read_base(place)
        assert list(found.shards) == [ONE, TWO] and found.index["weight_map"] == {"a": ONE, "b": ONE, "c": TWO}
        assert found.others() == ([], []), "the files that were read are no others"
        for key, tensor in tensors.items():
            shard = found.shard_of(key)
            assert b"".join(map(bytes, shard.chunks(key))) == bytes(bytes_of(tensor))
            assert torch.equal(shard.tensor(key), tensor)
        assert torch.equal(found.shard_of("a").tensor("a", 1, 3), tensors["a"][1:3])
    torch.save({"a": torch.ones(2), "more": {}}, old / two)
    refused(old, "holds other things than tensors by name")
    torch.save({"a": Path("x")}, old / two)
    refused(old, "cannot be read")
