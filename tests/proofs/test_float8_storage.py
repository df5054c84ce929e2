"""The storage of float8 weights, used in every way, and the layers that keep them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from uses import Layers, hold

import lorafx
from lorafx.adapters.storages import FLOAT8, Float8Linear, weights_of


class TwoLinears(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = (Float8Linear(nn.Linear(*sizes, dtype=torch.float64)) for sizes in ((5, 7), (7, 5)))

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def formula(lora, x):
    def adapted(layer, x):
        update = (x @ layer.lora_A.default.weight.T) @ layer.lora_B.default.weight.T
        return x @ (layer.weight.double() * layer.scale[:, None]).T + layer.bias + update / 2

    for layer in lora.layers:
        x = x + torch.tanh(adapted(layer.down, torch.relu(adapted(layer.up, x))))
    return x


CONFIG = {"r": 2, "lora_alpha": 1, "target_modules": ["up", "down"], "init_lora_weights": False}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is stored as float8")
def test_a_weight_in_float8_is_used_like_a_dense_one(tmp_path):
    """Merged, each weight is off by at most 1/16 of itself, in three layers of two."""
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    hold(lambda: Layers(TwoLinears), CONFIG, x, formula, tmp_path, merges_to=0.3)


def test_merging_rounds_each_weight_once_and_is_undone_exactly():
    base, lora = (model := TwoLinears()), lorafx.compile(model, CONFIG)
    before = {name: tensor.float().clone() for name, tensor in base.named_parameters()}
    update = lora.up.lora_B.default.weight.double() @ lora.up.lora_A.default.weight.double() / 2
    exact = FLOAT8.dense(FLOAT8.stored(base.up, "weight")).double() + update
    with pytest.warns(UserWarning, match=r"up\.weight is stored as float8.*: merging loses"):
        lora.merge_adapter()
    merged = FLOAT8.dense(FLOAT8.stored(base.up, "weight")).double()
    smallest = base.up.scale.double()[:, None] * 2**-10
    assert ((merged - exact).abs() <= torch.maximum(exact.abs() / 16, smallest)).all()
    assert (update.abs() > 0.01).any()
    lora.unmerge_adapter()
    for name, tensor in base.named_parameters():
        assert torch.equal(tensor.float(), before[name])


def test_a_layer_says_what_it_keeps():
    layer = Float8Linear(nn.Linear(48, 32, dtype=torch.bfloat16))
    assert (layer.weight.dtype, layer.scale.dtype, layer.bias.dtype) == (
        torch.float8_e4m3fn,
        torch.float32,
        torch.bfloat16,
    )
    ((parameter, reading, storage),) = weights_of(layer)
    assert (parameter, str(reading), storage) == ("weight", "linear", FLOAT8)
    assert storage.shape(layer, "weight") == (32, 48) and storage.dtype(layer, "weight") == torch.bfloat16
    assert str(layer) == "Float8Linear(in_features=48, out_features=32, bias=True)"
    assert not layer.weight.requires_grad and not layer.scale.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_casts_leave_weight_and_scale_as_they_are(dtype):
    layer = Float8Linear(nn.Linear(48, 32))
    before = copy.deepcopy(dict(layer.named_parameters()))
    layer.to(dtype)
    assert layer.dtype == layer.bias.dtype == dtype
    for name in ("weight", "scale"):
        own = getattr(layer, name)
        assert isinstance(own, nn.Parameter) and own.dtype == before[name].dtype
        assert torch.equal(own.float(), before[name].float())
    x = torch.randn(3, 48, dtype=dtype)
    assert layer(x).dtype == dtype
    assert layer.to("meta").weight.is_meta and layer.weight.dtype == torch.float8_e4m3fn


def test_adapters_take_the_dtype_that_the_layer_was_made_of():
    model = nn.Sequential(Float8Linear(nn.Linear(48, 32, dtype=torch.bfloat16)))
    for option, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        lora = lorafx.compile(model, {"r": 2, "target_modules": ["0"]}, autocast_adapter_dtype=option)
        assert {p.dtype for p in lora.parameters() if p.requires_grad} == {dtype}
        lora.unload()
