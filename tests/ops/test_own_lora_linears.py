"""Layers of their own code with their updates: the equations and their derivatives, one dense weight at a time."""

from __future__ import annotations

import sys
import weakref
from typing import ClassVar

import pytest
import torch
from torch import nn

from lorafx.ops.own_lora_linears import of_updates, own_lora_linears, reference
from lorafx.tree.own_layers import number_of, run_by_itself

DOUBLE = torch.float64
SIZES, RANKS, SCALINGS = (5, 4), (2, 3), (0.5, 3.0)


class Layer(nn.Module):
    """Of its own code, in float64; notes its calls and how many of its dense weights there are at once."""

    alive: ClassVar[list[weakref.ref]] = []
    most = 0

    def __init__(self, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, 3, dtype=DOUBLE), requires_grad=False)
        self.bias, self.calls = nn.Parameter(torch.randn(outputs, dtype=DOUBLE)), 0
        run_by_itself(self, "weight", outputs, None, lambda module: None, None, Layer.factor)

    def forward(self, x):
        self.calls += 1
        return nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)

    def factor(self, dtype):
        dense = self.weight.detach().clone()
        Layer.alive = [ref for ref in Layer.alive if ref() is not None] + [weakref.ref(dense)]
        Layer.most = max(Layer.most, len(Layer.alive))
        return dense


def given(dtype=DOUBLE):
    layers = [Layer(size) for size in SIZES]
    x = torch.randn(2, 3, 3, dtype=dtype, requires_grad=True)
    lora_As = [torch.randn(rank, 3, dtype=dtype, requires_grad=True) for rank in RANKS]
    lora_Bs = [torch.randn(size, rank, dtype=dtype, requires_grad=True) for size, rank in zip(SIZES, RANKS)]
    biases = [layers[0].bias, None]
    layers[1]._parameters["bias"] = None
    return layers, x, biases, lora_As, lora_Bs


def call(operator, layers, x, biases, z, lora_As, lora_Bs, **more):
    return operator(x, biases, [number_of(layer) for layer in layers], SIZES, z, lora_As, lora_Bs, SCALINGS, **more)


@pytest.mark.parametrize("apart", [False, True])
def test_all_derivatives_are_those_of_the_equations(apart):
    layers, x, biases, lora_As, lora_Bs = given()
    z = torch.randn_like(x, requires_grad=True) if apart else None

    def run(x, z, bias, *loras):
        return tuple(call(own_lora_linears, layers, x, [bias, None], z, loras[:2], loras[2:]))

    inputs = (x, z, biases[0], *lora_As, *lora_Bs)
    for found, wanted in zip(run(*inputs), call(reference, layers, x, biases, z, lora_As, lora_Bs)):
        torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_the_code_runs_once_and_one_dense_weight_is_alive():
    layers, x, biases, lora_As, lora_Bs = given()
    Layer.alive, Layer.most = [], 0
    ys = call(own_lora_linears, layers, x, biases, None, lora_As, lora_Bs)
    assert Layer.most == 0, "forward makes no weight dense itself"
    sum(y.sin().sum() for y in ys).backward()
    assert [layer.calls for layer in layers] == [1, 1]
    assert Layer.most == 1 and all(ref() is None for ref in Layer.alive)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_of_updates_come_when_no_dense_weight_is_there(monkeypatch, dropout):
    layers, x, biases, lora_As, lora_Bs = given()
    made = []

    def noted(*args):
        made.append(len(Layer.alive) > 0 and all(ref() is None for ref in Layer.alive))
        return of_updates(*args)

    monkeypatch.setattr(sys.modules["lorafx.ops.own_lora_linears"], "of_updates", noted)
    Layer.alive = []
    sum(y.sum() for y in call(own_lora_linears, layers, x, biases, None, lora_As, lora_Bs, dropout=dropout)).backward()
    assert made == [True]


def test_an_output_that_nobody_used_gives_no_gradient():
    layers, x, biases, lora_As, lora_Bs = given()
    call(own_lora_linears, layers, x, biases, None, lora_As, lora_Bs)[1].sum().backward()
    assert biases[0].grad is None and lora_As[0].grad is None and lora_Bs[0].grad is None
    wanted = torch.autograd.grad(call(reference, layers, x, biases, None, lora_As, lora_Bs)[1].sum(), (x, lora_As[1]))
    torch.testing.assert_close((x.grad, lora_As[1].grad), wanted, rtol=1e-13, atol=1e-13)


def test_a_layer_may_compute_in_another_dtype():
    """The layers' part of dx is rounded to float32; that of the updates is not."""
    layers, x, biases, lora_As, lora_Bs = given(dtype=torch.float32)
    wanted = torch.autograd.grad(
        sum(y.sin().sum() for y in call(reference, layers, x, biases, None, lora_As, lora_Bs)), x
    )
    found = torch.autograd.grad(
        sum(y.sin().sum() for y in call(own_lora_linears, layers, x, biases, None, lora_As, lora_Bs)), x
    )
    close = 32 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(found, wanted, rtol=close, atol=close)


def test_dropout_draws_what_torch_draws():
    layers, x, biases, lora_As, lora_Bs = given()
    wanted, grads = [], []
    for way in (reference, own_lora_linears):
        torch.manual_seed(0)
        z = nn.functional.dropout(x, 0.5) if way is reference else None
        more = {} if way is reference else {"dropout": 0.5}
        ys = call(way, layers, x, biases, z, lora_As, lora_Bs, **more)
        wanted.append(ys)
        grads.append(torch.autograd.grad(sum(y.sin().sum() for y in ys), (x, *lora_As, *lora_Bs)))
    torch.testing.assert_close(wanted[1], wanted[0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-13, atol=1e-13)


def test_compilers_neither_look_into_it_nor_run_the_code_again():
    from torch._dynamo.testing import AotEagerAndRecordGraphs

    layers, x, biases, lora_As, lora_Bs = given()
    numbers, backend = [number_of(layer) for layer in layers], AotEagerAndRecordGraphs()

    def compiled(x):
        ys = torch.ops.lorafx.own_lora_linears(x, biases, numbers, SIZES, None, lora_As, lora_Bs, SCALINGS)
        return sum(y.sin().sum() for y in ys)

    found = torch.autograd.grad(torch.compile(compiled, backend=backend)(x), (x, *lora_As, *lora_Bs, biases[0]))
    assert [layer.calls for layer in layers] == [1, 1]
    targets = [str(node.target) for graph in backend.bw_graphs for node in graph.graph.nodes]
    assert targets.count("lorafx.hidden_backward.default") == 2
    ys = call(reference, layers, x, biases, None, lora_As, lora_Bs)
    wanted = torch.autograd.grad(sum(y.sin().sum() for y in ys), (x, *lora_As, *lora_Bs, biases[0]))
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)
