"""loading: which tensors of a checkpoint make which of a model's is what `from_pretrained` does with them."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorafx.torch_private.loading import Loading, kept_in_float32

SIZES = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1, "num_attention_heads": 4}


def llava() -> nn.Module:
    vision = transformers.CLIPVisionConfig(**SIZES, image_size=16, patch_size=4).to_dict()
    text = models.llama(num_hidden_layers=1).config.to_dict()
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=3)
    return transformers.LlavaForConditionalGeneration(config)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**SIZES, vocab_size=90, num_key_value_heads=2, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


def qwen3_moe() -> nn.Module:
    settings = {"vocab_size": 90, "num_key_value_heads": 2, "num_experts": 3, "moe_intermediate_size": 40}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **settings))


def stored(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def on_meta(model: nn.Module) -> nn.Module:
    with torch.device("meta"):
        return type(model)(model.config)


MODELS = {
    "llama": (models.llama, 0),
    "gpt2": (models.gpt2, 0),
    "t5": (models.t5, 0),
    "bert": (models.bert, 0),
    "vit": (models.vit, 0),
    "llava": (llava, 0),
    "mixtral": (mixtral, 2),
    "qwen3-moe": (qwen3_moe, 2),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_of_a_checkpoint_finds_its_place_and_goes_back(tmp_path, name):
    make, conversions = MODELS[name]
    model = make()
    tensors, own = stored(model, tmp_path), model.state_dict()
    loading = Loading(on_meta(model), tensors)
    assert len(loading.conversions) == conversions
    for key, own_name in loading.names.items():
        assert torch.equal(tensors[key], own[own_name])
    for conversion in loading.conversions:
        part = {key: tensors[key] for key in conversion.patterns}
        made = conversion.loaded(part)
        assert conversion.name in made and all(torch.equal(tensor, own[key]) for key, tensor in made.items())
        back = conversion.stored(made)
        assert back.keys() == part.keys() and all(torch.equal(back[key], part[key]) for key in part)
        shapes = conversion.stored(conversion.loaded({key: tensor.to("meta") for key, tensor in part.items()}))
        assert {key: tensor.shape for key, tensor in shapes.items()} == {key: t.shape for key, t in part.items()}
    converted = {key for conversion in loading.conversions for key in conversion.patterns}
    assert loading.names.keys() | converted == tensors.keys()


def test_the_bare_models_prefix_is_added_or_taken_off(tmp_path):
    model = models.gpt2()
    tensors = stored(model.transformer, tmp_path / "bare")
    loading = Loading(on_meta(model), tensors)
    assert loading.names["h.0.ln_1.weight"] == "transformer.h.0.ln_1.weight" and len(loading.names) == len(tensors)
    whole = Loading(on_meta(model.transformer), stored(model, tmp_path / "whole"))
    assert whole.names["transformer.h.0.ln_1.weight"] == "h.0.ln_1.weight"
    assert loading.key_of("lm_head.weight") == "lm_head.weight"


def test_old_names_are_read(tmp_path):
    model = models.bert()
    tensors = stored(model, tmp_path)
    old = {k.replace("LayerNorm.weight", "LayerNorm.gamma"): t for k, t in tensors.items()}
    save_file(old, tmp_path / "old.safetensors")
    names = Loading(on_meta(model), old).names
    assert names["bert.embeddings.LayerNorm.gamma"] == "bert.embeddings.LayerNorm.weight"


def test_a_tensor_that_is_none_of_the_models_has_no_name():
    model = models.llama(num_hidden_layers=1)
    keys = [*model.state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq", "value_head.weight"]
    assert Loading(on_meta(model), keys).names.keys() == model.state_dict().keys()


def test_a_missing_tensor_has_the_key_that_it_would_be_saved_under(tmp_path):
    model = llava()
    keys = stored(model, tmp_path)
    loading = Loading(on_meta(model), keys)
    assert loading.key_of("lm_head.weight") == "language_model.lm_head.weight" in keys
    experts = Loading(on_meta(mixtral()), stored(mixtral(), tmp_path / "experts"))
    assert experts.key_of("model.layers.0.mlp.experts.down_proj") is None  # it is several


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_what_stays_in_float32_is_what_from_pretrained_keeps_so(tmp_path, dtype):
    model = models.t5(num_layers=1)
    stored(model, tmp_path)
    kept = kept_in_float32(on_meta(model), dtype)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype).state_dict()
    assert {name for name in loaded if kept(name)} == {n for n, t in loaded.items() if t.dtype == torch.float32}
    assert any(map(kept, loaded)) == (dtype == torch.float16)
