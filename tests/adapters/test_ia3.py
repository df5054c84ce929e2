"""(IA)³ where PEFT has no answer, or another; the rest is held to PEFT's in tests/peft/test_kinds.py."""

import copy

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lorafx
from lorafx.errors import ConfigError
from lorafx.graph.blocks import blocks_of


def test_factors_of_zero_are_taken_out_again_to_the_last_bit():
    model, x = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)), torch.randn(4, 5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lora = lorafx.compile(model, lorafx.IA3Config(target_modules=["0", "1"], feedforward_modules=["1"]))
    with torch.no_grad():
        lora[0].ia3_l.default[2] = 0
        lora[1].ia3_l.default[0, 3] = 0
    expected = lora(x)
    lora.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    assert (model[0].weight[2] == 0).all() and model[0].bias[2] == 0 and (model[1].weight[:, 3] == 0).all()
    lora.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Squares(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.Tanh()) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_layers_of_one_shape_share_a_block_only_where_the_same_side_is_multiplied():
    model, x = Squares().double(), torch.randn(2, 4, 6, dtype=torch.float64)
    config = lorafx.IA3Config(
        target_modules=r"layers\.\d\.0", feedforward_modules=r"layers\.1\.0", init_ia3_weights=False
    )
    lora = lorafx.compile(model, config)
    expected = x
    for number, layer in enumerate(lora.layers):
        gain = layer[0].ia3_l.default.view(4, 1)
        weight, bias = layer[0].weight, layer[0].bias
        inner = F.conv1d(expected * gain if number == 1 else expected, weight, bias, padding=1)
        inner = inner if number == 1 else inner * gain
        expected = torch.tanh(inner)
    torch.testing.assert_close(lora(x), expected, rtol=1e-12, atol=1e-12)
    assert len(blocks_of(lora.graph(x))) != 1


def test_in_half_precision_factors_near_one_are_seen():
    model, x = nn.Sequential(nn.Linear(48, 32)).bfloat16(), torch.randn(4, 48).bfloat16()
    lora = lorafx.compile(model, lorafx.IA3Config(target_modules=["0"], feedforward_modules=[]))
    assert torch.equal(lora(x), model(x))
    with torch.no_grad():
        lora[0].ia3_l.default.mul_(1 + 2**-9)
    assert torch.equal(lora(x), (model(x).float() * (1 + 2**-9)).bfloat16())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target_modules": ["0"], "feedforward_modules": ["1"]},
            "`feedforward_modules` has 1, which `target_modules`",
        ),
        ({"feedforward_modules": 3}, "`feedforward_modules` must be"),
        ({"layers_to_transform": [1]}, "`layers_to_transform` must be None: IA3Config has none"),
        ({"init_ia3_weights": "yes"}, "`init_ia3_weights` must be True or False"),
    ],
)
def test_a_wrong_field_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        lorafx.IA3Config(**changes)


@pytest.mark.parametrize(
    ("layer", "changes", "message"),
    [
        (nn.Embedding(5, 3), {"feedforward_modules": []}, "0 is an embedding"),
        (nn.Linear(5, 3), {}, "`feedforward_modules` is None and no default is known"),
    ],
)
def test_what_it_cannot_act_on_is_refused(layer, changes, message):
    with pytest.raises(ConfigError, match=message):
        lorafx.compile(nn.Sequential(layer), lorafx.IA3Config(target_modules=["0"], **changes))


def test_several_are_combined_as_in_peft():
    fields = {"target_modules": ["0", "1"], "feedforward_modules": ["1"], "init_ia3_weights": False}
    model, x = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).double(), torch.randn(4, 5, dtype=torch.float64)
    lora = lorafx.compile(model, lorafx.IA3Config(**fields), adapter_name="a", capture="sites")
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.IA3Config(**fields), "a")
    lora.add_adapter("b", lorafx.IA3Config(**fields))
    theirs.add_adapter("b", peft.IA3Config(**fields))
    values = {name: tensor for name, tensor in lora.state_dict().items() if "ia3_l" in name}
    theirs.base_model.model.load_state_dict(values, strict=False)
    theirs.base_model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "sum")
    theirs.set_adapter("sum")
    for how in ("linear", "svd"):  # the latter is what LoRA's is by default
        lora.add_weighted_adapter(["a", "b"], [0.7, -0.4], how, how)
        lora.set_adapter(how)
        torch.testing.assert_close(lora(x), theirs(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(ConfigError, match="by \"linear\", not 'cat'"):
        lora.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", "cat")
    lora.add_adapter("other", lorafx.IA3Config(target_modules=["0"], feedforward_modules=[]))
    with pytest.raises(ConfigError, match="adapt the same modules"):
        lora.add_weighted_adapter(["a", "other"], [1.0, 1.0], "c")
