"""fuse_own_layers: layers of bitsandbytes and their updates are one operator, whose own backward is the equation's."""

from __future__ import annotations

import pytest
import torch
from graphs import adapted, text
from packed_layers import Block, Packed
from torch import nn

import lorafx
from lorafx.passes import FuseOwnLayers

bnb = pytest.importorskip("bitsandbytes")
# Products of up to 128 numbers in float32.
CLOSE = {"rtol": 0, "atol": 128 * torch.finfo(torch.float32).eps}


def nf4(inputs, outputs, bias=True):
    return bnb.nn.LinearNF4(inputs, outputs, bias=bias, compute_dtype=torch.float32)


class Fork(nn.Module):
    """Two layers of one value, and one of what they give."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nf4(64, 128, False), nf4(64, 128), nf4(128, 64)

    def forward(self, x):
        x = x.sin()
        return self.c(self.a(x) * self.b(x))


def test_before_and_after():
    lora = adapted(Fork().to("cpu"), target_modules=["a", "b", "c"])
    lines = text(lora.graph(torch.randn(2, 5, 64)))
    assert [line for line in lines if ".lorafx_number" not in line and ".weight" not in line] == [
        "sin = sin(x)",
        "b_bias = b.bias",
        "own_lora_linears = lorafx.own_lora_linears(sin, [None, b_bias], [a_lorafx_number, b_lorafx_number], [128, "
        "128], None, [a_lora_a_default_weight, b_lora_a_default_weight], [a_lora_b_default_weight, "
        "b_lora_b_default_weight], [3.0, 3.0])",
        "getitem = getitem(own_lora_linears, 0)",
        "getitem_1 = getitem(own_lora_linears, 1)",
        "mul = mul.Tensor(getitem, getitem_1)",
        "c_bias = c.bias",
        "own_lora_linear = lorafx.own_lora_linear(mul, c_bias, c_lorafx_number, 64, None, c_lora_a_default_weight, "
        "c_lora_b_default_weight, 3.0)",
    ]


@pytest.mark.parametrize("more", [{}, {"lora_dropout": 0.5, "bias": "all"}], ids=["plain", "dropout and biases"])
def test_a_model_trains_as_without_the_pass(more):
    gradients, base, x = [], Fork().to("cpu"), torch.randn(2, 5, 64)
    for passes in (lorafx.passes.default, lorafx.passes.default.without("fuse_own_layers")):
        lora = lorafx.compile(
            base,
            {"r": 3, "target_modules": ["a", "b", "c"], "init_lora_weights": False, **more},
            random_state=0,
            pipeline=passes,
            capture="graph",
        )
        given = x.clone().requires_grad_()
        torch.manual_seed(1)
        lora(given).sin().sum().backward()
        gradients.append([given.grad, *(p.grad for p in lora.parameters() if p.requires_grad)])
        assert ("own_lora_linear" in lora.graph(x).code) == ("fuse_own_layers" in str(passes))
    for found, expected in zip(*gradients, strict=True):
        size = expected.abs().max()
        torch.testing.assert_close(found / size, expected / size, **CLOSE)


class Mixed(nn.Module):
    """Numbered layers, of bitsandbytes and of somebody's own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block(kind) for kind in (nf4, Packed, bnb.nn.Linear8bitLt, nf4))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def test_layers_whose_gradient_only_their_code_knows_stay_as_they_are():
    base = Mixed()
    base.layers[2].requires_grad_(False)
    for layer in (base.layers[2].up, base.layers[2].down):
        layer.weight = bnb.nn.Int8Params(layer.weight.data, has_fp16_weights=False, requires_grad=False)
        layer.state.has_fp16_weights = False
    base = base.to("cpu")
    lora, x = adapted(base, target_modules=["up", "down"]), torch.randn(2, 5, 64)
    plain = lorafx.compile(base, lora.peft_config["default"], capture="sites", random_state=0)
    torch.testing.assert_close(lora(x), plain(x), **CLOSE)
    captured = lora.graph(x)
    found = [node.target for gm in captured.modules() if hasattr(gm, "graph") for node in gm.graph.nodes]
    assert torch.ops.lorafx.own_forward.default in found and torch.ops.lorafx.own_lora_linear.default in found


def test_what_one_operator_cannot_hold_stays_as_it_is():
    lora, x = adapted(Fork().to("cpu"), target_modules=["a", "b", "c"]), torch.randn(3, 64)
    wanted = lora(x)
    lora.set_scale("default", 2.0)
    assert "own_lora_linear" not in lora.graph(x).code, "the scaling is a tensor"
    lora.set_scale("default", 1.0)
    torch.testing.assert_close(lora(x), wanted, **CLOSE)
    with torch.autocast("cpu", torch.bfloat16):
        assert "own_lora_linear" not in lora.graph(x).code
    assert FuseOwnLayers.name == "fuse_own_layers"
