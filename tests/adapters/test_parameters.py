"""Parameters that a config names, where a library keeps them packed, and the layers beside them."""

import mxfp4
import pytest
import torch
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

import lorafx
from lorafx.errors import ConfigError, SelectionError

ATTENTION = {"r": 4, "target_modules": ["q_proj", "o_proj"], "init_lora_weights": False}
EXPERTS = {"r": 4, "target_modules": [], "target_parameters": ["experts.gate_up_proj"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return mxfp4.checkpoint(tmp_path_factory.mktemp("gpt-oss"))


@pytest.mark.slow
def test_layers_beside_packed_experts_are_adapted_as_beside_dense_ones(folder, tmp_path):
    ids = torch.randint(48, (2, 5))
    expected = lorafx.compile(mxfp4.dequantised(folder), ATTENTION, capture="sites")
    expected.save_pretrained(tmp_path)
    lora = lorafx.load(mxfp4.packed(folder), tmp_path, is_trainable=True)
    outcomes = [model(input_ids=ids, labels=ids) for model in (expected, lora)]
    torch.testing.assert_close(outcomes[1].logits, outcomes[0].logits, rtol=0, atol=64 * torch.finfo().eps)
    for outcome in outcomes:
        outcome.loss.backward()
    assert [call.served_by for call in lora.explain().calls] == ["graph"]
    trained = {name: parameter for name, parameter in expected.named_parameters() if parameter.requires_grad}
    for name, parameter in trained.items():
        grad = lora.get_parameter(name).grad
        assert (grad - parameter.grad).norm() < 1e3 * torch.finfo().eps * parameter.grad.norm(), name


def test_experts_that_are_packed_are_refused_by_name(folder):
    with pytest.raises(SelectionError, match=r"layers\.0\.mlp\.experts\.gate_up_proj, which Experts keeps as .*dequan"):
        lorafx.compile(mxfp4.packed(folder), EXPERTS)
    model = mxfp4.dequantised(folder)
    model.model.layers[0].mlp.experts = Mxfp4GptOssExperts(model.config)  # before a checkpoint is loaded into it
    with pytest.raises(SelectionError, match=r"Mxfp4GptOssExperts keeps as torch\.uint8.*dequantised"):
        lorafx.compile(model, EXPERTS)
    with pytest.raises(ConfigError, match=r"`modules_to_save` would train .*experts, which keeps .* as torch\.uint8"):
        lorafx.compile(model, ATTENTION | {"modules_to_save": ["experts"]})


def test_a_parameter_of_the_model_itself_is_refused():
    model = torch.nn.ParameterDict({"matrix": torch.zeros(3, 5)})
    with pytest.raises(SelectionError, match="matrix, which is the model's own"):
        lorafx.compile(model, {"target_parameters": ["matrix"], "target_modules": []})
