"""Shared by the tests of commands: a base on disk, and an adapter of it."""

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import lorafx


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """A base of three layers on disk, and an adapter of it."""
    folder = tmp_path_factory.mktemp("saved")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "vocab_size": 32}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    model.save_pretrained(folder / "base")
    config = lorafx.LoraConfig(r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    lora = lorafx.compile(model, config)
    lora.save_pretrained(folder / "adapter")
    return folder, lora
