"""DeLoRA: its equation, and the bound on what it changes."""

import pytest
import torch
from torch import nn
from uses import Layers, Pair, hold, of_layers

import lorafx
from lorafx.errors import ConfigError

CONFIG = lorafx.DeloraConfig(r=3, delora_lambda=2, rank_pattern={"down": 2}, target_modules=["up", "down"])


def delta(layer):
    a, b, bound = layer.delora_A.default, layer.delora_B.default, layer.delora_lambda.default
    lengths = bound / a.shape[0] / (a.norm(dim=1) * b.norm(dim=0))
    return (b * lengths) @ a * layer.delora_w_norm.default


def adapted(layer, x):
    return x @ (layer.weight + delta(layer)).T + layer.bias


@pytest.mark.slow
def test_its_equation_holds_in_every_use(tmp_path):
    hold(lambda: Layers(Pair).double(), CONFIG, torch.randn(4, 6, 5, dtype=torch.float64), of_layers(adapted), tmp_path)


def test_it_starts_at_nothing_with_the_norms_of_the_columns():
    model, x = Layers(Pair), torch.randn(4, 5)
    lora = lorafx.compile(model, CONFIG)
    assert torch.equal(lora(x), model(x))
    for layer in lora.layers:
        torch.testing.assert_close(layer.up.delora_w_norm.default, layer.up.weight.norm(dim=0))
    lora(x).sum().backward()
    assert lora.layers[0].up.delora_B.default.grad.abs().max() > 0, "it can leave where it starts"


def test_lambda_bounds_the_change_however_long_its_vectors_are():
    lora = lorafx.compile(
        nn.Sequential(nn.Linear(5, 7)), lorafx.DeloraConfig(r=3, delora_lambda=2, target_modules=["0"])
    )
    with torch.no_grad():
        lora[0].delora_B.default.normal_(std=1e3)
        lora[0].delora_w_norm.default.fill_(1)
        assert delta(lora[0]).norm() <= 2 + 1e-5


def test_a_quantised_layer_has_the_norms_of_its_dense_weight():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear4bit(64, 96, compute_dtype=torch.float32)).to("cpu")
    x = torch.randn(4, 64)
    lora = lorafx.compile(model, lorafx.DeloraConfig(r=3, target_modules=["0"], init_weights=False))
    dense = bnb.functional.dequantize_4bit(model[0].weight, model[0].weight.quant_state)
    torch.testing.assert_close(lora[0].delora_w_norm.default, dense.norm(dim=0))
    update = x @ delta(lora[0]).T
    torch.testing.assert_close(lora(x) - model(x), update, rtol=1e-4, atol=1e-4)  # sums of 64 in float32, twice


@pytest.mark.parametrize(
    ("field", "value"), [("r", -1), ("delora_lambda", "15"), ("rank_pattern", {"up": 0}), ("lambda_pattern", {"(": 1})]
)
def test_fields_that_make_no_sense_are_named(field, value):
    with pytest.raises(ConfigError, match=field):
        lorafx.DeloraConfig(**{field: value})
