"""fuse_lora: a linear and its update are one operator, whose own backward is the equation's."""

from __future__ import annotations

import pytest
import torch
from graphs import INSERT, Chain, adapted, run, text

import lorafx
from lorafx.passes import ElideCasts, ElideDropout, FoldScaling, FuseLora

PLAIN = (*INSERT, ElideCasts(), ElideDropout())
fused = torch.ops.lorafx.lora_linear


def test_before_and_after():
    lora, x = adapted(Chain(), target_modules=["second"]), torch.randn(5, 2, 4)
    assert text(run(lora, (*PLAIN, FuseLora()), x))[2:] == [
        "relu = relu(linear)",
        "second_weight = second.weight",
        "second_bias = second.bias",
        "second_lora_a_default_weight = second.lora_A.default.weight",
        "second_lora_b_default_weight = second.lora_B.default.weight",
        "lora_linear = lorafx.lora_linear(relu, second_weight, second_bias, None, second_lora_a_default_weight, "
        "second_lora_b_default_weight, 3.0)",
    ]


@pytest.mark.slow
def test_a_model_with_dropout_trains_as_without_the_pass():
    gradients = []
    kept = lorafx.passes.default.without("fuse_dropout")
    for passes in (kept, kept.without("fuse_lora")):
        torch.manual_seed(0)
        config = {"target_modules": "all-linear", "r": 2, "lora_dropout": 0.5, "init_lora_weights": False}
        lora = lorafx.compile(Chain().double(), config, random_state=0, pipeline=passes)
        x = torch.randn(7, 4, dtype=torch.float64)
        torch.manual_seed(1)
        lora(x).sin().sum().backward()
        gradients.append([p.grad for p in lora.parameters() if p.requires_grad])
        nodes = [node.target for node in lora.graph(x).graph.nodes]
        assert (nodes.count(fused.default) == 2) == ("fuse_lora" in str(passes))
    for found, expected in zip(*gradients):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_several_adapters_go_on_top_of_one_another():
    lora, x = adapted(Chain().double()), torch.randn(5, 4, dtype=torch.float64)
    lora.add_adapter("other", {"r": 3, "target_modules": ["second"], "init_lora_weights": False})
    lora.set_adapter(["default", "other"])
    folded = lorafx.passes.default.without("fuse_lora")
    output = lora(x)
    assert sum(node.target is fused.default for node in lora.graph(x).graph.nodes) == 2
    lora._lorafx.dispatcher.pipeline = folded
    lora._lorafx.dispatcher.clear()
    torch.testing.assert_close(lora(x), output, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32], ids=["two dtypes", "autocast"])
def test_where_dtypes_differ_the_update_stays_as_it_is(base):
    lora = adapted(Chain().to(base), adapter_compute_dtype="float32")
    with torch.autocast("cpu", torch.bfloat16, enabled=base == torch.float32):
        gm = lora.graph(torch.randn(5, 4, dtype=base))
    assert all(node.target is not fused.default for node in gm.graph.nodes)


def test_a_base_weight_that_trains_gets_its_gradient():
    gradients = []
    for passes in ((*PLAIN, FuseLora()), (*PLAIN, FoldScaling())):
        lora = adapted(Chain().double())
        for parameter in lora.parameters():
            parameter.requires_grad_()
        x = torch.linspace(-1, 1, 20, dtype=torch.float64).view(5, 4)
        gm = lorafx.trace(lora, x)
        torch.manual_seed(0)
        lorafx.Pipeline(*passes).run(gm, lora._lorafx.context)
        gm(x).sin().sum().backward()
        gradients.append({name: p.grad for name, p in lora.named_parameters()})
    assert None not in gradients[0].values()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-12, atol=1e-12)


class Bottleneck(torch.nn.Module):
    """A base model's own update, scaled by a tensor."""

    def __init__(self):
        super().__init__()
        self.wide, self.target = torch.nn.Linear(4, 6), torch.nn.Linear(6, 3)
        self.down, self.up = torch.nn.Linear(4, 2, bias=False), torch.nn.Linear(2, 6, bias=False)
        self.gamma = torch.nn.Parameter(torch.randn(()))

    def forward(self, x):
        return self.target(self.wide(x) + self.up(self.down(x)) * self.gamma)


@pytest.mark.slow
def test_an_update_that_a_tensor_scales_stays():
    lora, x = adapted(Bottleneck(), target_modules=["target"]), torch.randn(5, 4)
    gm = run(lora, (*PLAIN, FuseLora()), x)
    assert len(gm.graph.find_nodes(op="call_function", target=fused.default)) == 1
    expected = run(lora, PLAIN, x)(x)
    torch.testing.assert_close(gm(x), expected)
