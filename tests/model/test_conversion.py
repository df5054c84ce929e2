"""to_float8: which layers it replaces, what it refuses, and what it leaves as it was."""

from __future__ import annotations

import gc
import weakref

import models
import pytest
import torch
from torch import nn

import lorafx
from lorafx.adapters.storages import Float8Linear
from lorafx.adapters.storages.float8 import FLOAT8
from lorafx.errors import AdapterError, ConfigError, SelectionError


def frozen_llama(**sizes):
    return models.llama(num_hidden_layers=2, **sizes).requires_grad_(False)


def converted(model):
    return [name for name, module in model.named_modules() if isinstance(module, Float8Linear)]


def test_all_linear_layers_but_the_head():
    model = frozen_llama()
    before = dict(model.named_parameters())
    assert lorafx.to_float8(model) is model
    assert len(converted(model)) == 2 * 7 and type(model.lm_head) is nn.Linear
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in converted(model):
            assert parameter is before[name]
        elif name.endswith(".weight"):
            dense = parameter.double() * model.get_parameter(f"{name.removesuffix('weight')}scale")[:, None]
            assert ((dense - before[name]).abs() <= before[name].abs() / 16 + 1e-6).all()
    call = models.call(model)
    with torch.no_grad():
        off = model(**call).logits - frozen_llama()(**call).logits
    assert 0 < off.norm() < 0.1 * frozen_llama()(**call).logits.norm()


def test_layers_by_their_names():
    assert converted(lorafx.to_float8(frozen_llama(), ["q_proj", "layers.1.mlp.up_proj"])) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]
    assert converted(lorafx.to_float8(frozen_llama(vocab_size=96), "lm_head")) == ["lm_head"]


def test_layers_that_transformers_keeps_in_float32_stay():
    """T5 casts what it gives `wo` to the dtype of its weight."""
    model = lorafx.to_float8(models.t5().requires_grad_(False))
    assert converted(model) and not any(name.endswith("wo") for name in converted(model))
    assert model(**models.call(model)).logits.isfinite().all()


def test_other_sizes_classes_and_shared_weights_stay():
    class Own(nn.Linear):
        pass

    tied = nn.Linear(16, 16), nn.Linear(16, 16)
    tied[1].weight = tied[0].weight
    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16), Own(16, 16), *tied, nn.Linear(16, 32))
    lorafx.to_float8(model.requires_grad_(False))
    assert converted(model) == ["5"] and model[3].weight is model[4].weight


def test_a_layer_that_hangs_in_two_places_stays_one_layer():
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.Sequential(nn.ReLU(), shared)).requires_grad_(False).eval()
    lorafx.to_float8(model)
    assert isinstance(model[0], Float8Linear) and model[0] is model[1][1] and not model[0].training


def test_no_dense_weight_stays_in_memory():
    model = frozen_llama()
    weights = [weakref.ref(module.weight) for module in model.modules() if type(module) is nn.Linear][:-1]
    lorafx.to_float8(model)
    gc.collect()
    assert len(weights) == 14 and [ref for ref in weights if ref() is not None] == []


def test_a_model_on_meta_stays_there():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 32)).requires_grad_(False)
    layer = lorafx.to_float8(model)[0]
    assert layer.weight.is_meta and layer.weight.shape == (32, 16) and layer.scale.shape == (32,)


def test_refusals_leave_the_model_as_it_was():
    model = frozen_llama()
    model.model.layers[1].mlp.up_proj.weight.requires_grad_()
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj\.weight is trainable.*freeze the base"):
        lorafx.to_float8(model)
    with pytest.raises(ConfigError, match=r"modules='\(' is no regular expression"):
        lorafx.to_float8(frozen_llama(), "(")
    with pytest.raises(SelectionError, match=r"to convert \(modules=\['q'\]\)"):
        lorafx.to_float8(model, ["q"])
    assert converted(model) == []
    lora = lorafx.compile(model, {"r": 2, "target_modules": ["q_proj"]})
    with pytest.raises(AdapterError, match="adapted already"):
        lorafx.to_float8(lora)


def test_a_layer_in_float8_cannot_be_trained_as_a_whole():
    model = lorafx.to_float8(frozen_llama())
    with pytest.raises(ConfigError, match=r"would train \S+\.gate_proj, whose weight is stored as float8"):
        lorafx.compile(model, {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["mlp"]})


@pytest.mark.filterwarnings("ignore:.*is stored as float8")
def test_adapters_are_saved_and_loaded_as_those_of_a_dense_base(tmp_path):
    config = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    dense = lorafx.compile(frozen_llama(), config, capture="sites")
    dense.save_pretrained(tmp_path)
    lora = lorafx.load(lorafx.to_float8(frozen_llama()), tmp_path, capture="sites")
    trained = {name: p for name, p in dense.named_parameters() if ".lora_" in name}
    assert len(trained) == 2 * 2 * 2
    for name, parameter in trained.items():
        assert torch.equal(lora.get_parameter(name), parameter)
    lora.merge_adapter()
    lora.unmerge_adapter()
    fresh = lorafx.to_float8(frozen_llama()).state_dict()
    for name, tensor in lora.unload().state_dict().items():
        assert torch.equal(tensor.float(), fresh[name].float())


def test_what_saves_the_base_saves_a_dense_one(tmp_path):
    """Of it a plain model is made, and another one in float8, both with the same weights."""
    torch.manual_seed(0)
    base = lorafx.to_float8(frozen_llama().bfloat16())
    base.save_pretrained(tmp_path)
    plain = type(base).from_pretrained(tmp_path, dtype=torch.bfloat16)
    layers = [model.model.layers[0].self_attn.q_proj for model in (plain, base)]
    dense = FLOAT8.dense(FLOAT8.stored(layers[1], "weight"))
    assert type(layers[0]) is nn.Linear and torch.equal(layers[0].weight.float(), dense)
    other = lorafx.to_float8(frozen_llama(seed=1).bfloat16())
    other.load_state_dict(plain.state_dict())
    assert isinstance(other.model.layers[0].self_attn.q_proj, Float8Linear)
    tokens = torch.arange(12).view(2, 6)
    assert torch.equal(other(input_ids=tokens).logits, base(input_ids=tokens).logits)
