"""A checkpoint of many times the memory is merged: 2 GB of shards within 128 MB, beside what importing takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from lorafx.files.shards import Shard

WIDTH, INNER, LAYERS, RANK = 2048, 8192, 8, 16
LIMIT = 128 << 20

SCRIPT = """
import resource, sys
import lorafx
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
lorafx.merge(*sys.argv[1:])
print(before * 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def hollow(folder: Path) -> int:
    """A base model of zeros that take no place on the disk: files of headers and holes. Returns its bytes."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "vocab_size": 131072}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=16, num_key_value_heads=4, head_dim=128)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    names = sorted(model.state_dict())
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    total = 0
    for file, keys in halves.items():
        header, end = {}, 0
        for key in keys:
            shape = list(model.state_dict()[key].shape)
            begin, end = end, end + 2 * torch.Size(shape).numel()
            header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)
        total += end
    index = {"metadata": {"total_size": total}, "weight_map": {k: f for f, keys in halves.items() for k in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    """An adapter for the embeddings and two linear layers of each block; returns its tensors."""
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": ["embed_tokens", "q_proj", "up_proj"],
    }
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for layer in range(LAYERS):
        for site, out in (("self_attn.q_proj", 2048), ("mlp.up_proj", INNER)):
            prefix = f"base_model.model.model.layers.{layer}.{site}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, WIDTH)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(out, RANK)
    embedding = "base_model.model.model.embed_tokens.lora_embedding"
    tensors |= {f"{embedding}_A": torch.randn(RANK, 131072), f"{embedding}_B": torch.randn(WIDTH, RANK)}
    save_file(tensors, folder / "adapter_model.safetensors")
    return tensors


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is told in other units, and holes are the system's")
def test_a_checkpoint_of_two_gigabytes_is_merged_in_a_fifteenth_of_that(tmp_path):
    total = hollow(tmp_path / "base")
    tensors = adapter(tmp_path / "adapter")
    assert total > 15 * LIMIT
    paths = [str(tmp_path / name) for name in ("base", "adapter", "out")]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = map(int, done.stdout.split())
    assert after - before < LIMIT
    shards = [Shard.read(file) for file in (tmp_path / "out").glob("*.safetensors")]
    for key, part in (("model.layers.7.mlp.up_proj", "lora"), ("model.embed_tokens", "lora_embedding")):
        end = ".weight" if part == "lora" else ""
        a, b = (tensors[f"base_model.model.{key}.{part}_{x}{end}"].double() for x in "AB")
        rows = slice(5000, 5010)
        expected = b[rows] @ a if part == "lora" else (b @ a[:, rows]).t()
        shard = next(shard for shard in shards if f"{key}.weight" in shard.entries)
        found = shard.tensor(f"{key}.weight", 5000, 5010).double()
        near = 2**-20 * float(expected.abs().max())  # W cancels some of a change that is rounded to float32
        torch.testing.assert_close(found, expected, rtol=2**-8, atol=near)
    for file in (tmp_path / "out").iterdir():
        file.unlink()  # two gigabytes, which would stay until the third next run
