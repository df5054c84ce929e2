"""A model with a cache, adapted and plain."""

import copy

import pytest
import torch
import transformers

import lorafx


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    lora = lorafx.compile(model, {"target_modules": ["q_proj"], "init_lora_weights": False})
    return lora.eval(), copy.deepcopy(lora).merge_and_unload().eval()
