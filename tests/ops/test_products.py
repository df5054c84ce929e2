"""products: in float32 by oneDNN, where MKL does not use what the processor has."""

from __future__ import annotations

import pytest
import torch
from models import llama
from operators import ADAPTED, of_linear
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import lorafx
from lorafx.capture.export import trace
from lorafx.ops import linear, linear_cross_entropy
from lorafx.ops.cpu import products
from lorafx.passes import Canonicalize, ChooseKernels
from lorafx.pipeline import Pipeline

EPS = torch.finfo(torch.float32).eps
T, K, N, R = 160, 130, 110, 12  # 160 · 130 · 110 multiplications are enough to go by oneDNN, 160 · 130 · 12 are not

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def avx512_left(monkeypatch):
    """A processor of which MKL does not use all, whatever this one is."""
    monkeypatch.setattr(products, "mkl_leaves_avx512", lambda: True)


class Products(TorchDispatchMode):
    """Which operators multiply."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in ("aten::mm", "aten::addmm", "aten::addmm_", "mkldnn::_linear_pointwise"):
            self.called.append(name.removeprefix("aten::").removeprefix("mkldnn::_"))
        return func(*args, **(kwargs or {}))


def near(found, exact, length):
    """Sums of `length` products in float32, in any order: relative to the norm, a few roundings of each on average."""
    off = (found.double() - exact).norm() / exact.norm()
    assert off < 2 * EPS * length**0.5, float(off / EPS)


def wide(rows, columns, *, transposed=False, every=1):
    tensor = torch.randn(columns, rows).t() if transposed else torch.randn(rows, columns * every)
    return tensor if transposed else tensor[:, ::every]


LAYOUTS = [{}, {"transposed": True}, {"every": 2}]


@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
def test_products_of_all_layouts(left, right):
    x, y, z = wide(T, K, **left), wide(K, N, **right), wide(T, N, **right)
    own = torch.randn(T, N)
    with Products() as asked:
        found = (
            products.matmul(x, y),
            products.linear(x, y.t(), y[0]),
            products.over_rows(x, z),
            products.over_rows(z, x),
        )
        with torch.no_grad():  # as in a backward
            total = products.accumulated(own.clone(), x, y)
    assert asked.called == ["linear_pointwise"] * 5
    x, y, z = x.double(), y.double(), z.double()
    for ours, exact, length in zip(found, (x @ y, x @ y + y[0], x.t() @ z, z.t() @ x), (K, K, T, T), strict=True):
        near(ours, exact, length)
    near(total, own.double() + x @ y, K)


def test_who_goes_by_what_torch_takes():
    x, W = torch.randn(T, K), torch.randn(N, K)
    assert products.onednn_pays(x, W)
    assert not products.onednn_pays(x[:2], W) and not products.onednn_pays(x[:, :0], W[:, :0])
    assert not products.onednn_pays(x.double(), W.double()) and not products.onednn_pays(x.bfloat16(), W.bfloat16())
    assert not products.onednn_pays(x.to("meta"), W.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not products.onednn_pays(x, W) and products.linear(x, W).dtype == torch.bfloat16
    with Products() as asked:
        products.linear(x, W.requires_grad_()).sum().backward()
    assert W.grad is not None and "linear_pointwise" not in asked.called


def test_this_processor(monkeypatch):
    monkeypatch.undo()
    processor = {"avx512_f": True, "cpu_name": "AMD EPYC"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    leaves = products.mkl_leaves_avx512.__wrapped__
    assert leaves()
    processor["avx512_f"] = False
    assert not leaves()
    processor |= {"avx512_f": True, "cpu_name": "Intel(R) Xeon(R) Platinum 8488C"}
    assert not leaves()
    processor["cpu_name"] = ""
    assert not leaves()
    processor["cpu_name"] = "AMD EPYC"
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not leaves()


def of_one_linear(x, W, b, A, B):
    return of_linear(x, W, b, A, B) + (A.sum() + B.sum())  # so that all have a gradient


def of_a_head(x, W, b, A, B):
    labels = torch.arange(T).view(2, -1) % N
    return linear_cross_entropy(x, W, b, linear(x, A), B, 1.7, labels)


OPERATORS = [*ADAPTED, of_one_linear, of_a_head]
operators = pytest.mark.parametrize("function", OPERATORS)


def some():
    """x, W, b, A and B, of variances with which no part of an output is lost beside another."""
    return [
        torch.randn(2, T // 2, K),
        torch.randn(N, K) * K**-0.5,
        torch.randn(N),
        torch.randn(R, K) * K**-0.5,
        torch.randn(N, R) * R**-0.5,
    ]


def outcome(function, given):
    given = [tensor.clone().requires_grad_() for tensor in given]
    output = function(*given)
    return [output.detach(), *torch.autograd.grad(output.sin().sum(), given)]


@operators
def test_operators(function):
    given = some()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:  # which sees into operators
        found = outcome(function, given)
    assert "mkldnn::_linear_pointwise" in {event.key for event in profiled.key_averages()}
    exact = outcome(function, [tensor.double() for tensor in given])
    for ours, theirs in zip(found, exact, strict=True):
        near(ours, theirs, 4 * (T + K))  # up to four products one after the other


@operators
def test_inference(function):
    given = some()
    with torch.no_grad():
        found, exact = function(*given), function(*(tensor.double() for tensor in given))
    near(found, exact, 2 * K)


@pytest.mark.parametrize("function", OPERATORS[:-1])
def test_second_derivatives(function):
    given = some()

    def penalty(given):
        x, *others = (tensor.clone().requires_grad_() for tensor in given)
        (dx,) = torch.autograd.grad(function(x, *others).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), others[0])[0]

    near(penalty(given), penalty([tensor.double() for tensor in given]), 16 * (T + K))


@operators
def test_a_compiler_is_given_what_it_knows(function):
    def trained(x, *others):
        return torch.autograd.grad(function(x.requires_grad_(), *others).sum(), x)

    called = [str(node.target) for node in make_fx(trained, tracing_mode="fake")(*some()).graph.nodes]
    assert len(called) > 6 and not any("mkldnn" in target for target in called), called


@pytest.mark.parametrize("shape", [(), (1,), (1, N), (T, N)], ids=str)
def test_a_bias_that_is_broadcast(shape):
    x, W, b = torch.randn(T, K), torch.randn(N, K), torch.randn(shape)

    def trained(function, dtype):
        given = [each.to(dtype).requires_grad_() for each in (x, W, b)]
        output = function(*given)
        return output, *torch.autograd.grad(output.sin().sum(), given)

    for ours, exact in zip(trained(linear, torch.float32), trained(F.linear, torch.float64), strict=True):
        assert ours.shape == exact.shape
        near(ours, exact, 4 * (T * N))
    with torch.no_grad():
        assert torch.equal(products.linear(x, W, b), F.linear(x, W, b))


def test_a_frozen_layer_keeps_its_weight_alone():
    x, W = torch.randn(T, K, requires_grad=True), torch.randn(N, K)
    for trained in (x, W):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            linear(x.detach().requires_grad_(trained is x), W.detach().requires_grad_(trained is W))
        assert [each.shape for each in kept] == [W.shape if trained is x else x.shape]


def test_who_has_said_otherwise():
    x, W = torch.randn(T, K), torch.randn(N, K)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not products.onednn_pays(x, W)
    assert not products.onednn_pays(x, W.to_sparse_csr()) and not products.onednn_pays(x, W[0])
    assert "mkldnn" not in str(torch.jit.trace(lambda x: products.linear(x, W), (x,), check_trace=False).graph)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        products.linear(x[:, 1:], W)


def test_multiplications_are_counted():
    with FlopCounterMode(display=False) as counted:
        products.linear(torch.randn(2, T, K), torch.randn(N, K))
    assert counted.get_total_flops() == 2 * 2 * T * K * N


class Small(nn.Module):
    """(…, 130) -> (…, 110) by two linear layers."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(K, N), nn.Linear(N, N, bias=False)

    def forward(self, x):
        return self.out(F.silu(self.into(x)))


def test_the_pass():
    model, x = Small(), torch.randn(2, T, K)
    gm = trace(model, x)
    assert Pipeline(Canonicalize(), ChooseKernels()).run(gm)
    assert [str(n.target) for n in gm.graph.nodes if "linear" in str(n.target)] == ["lorafx.linear.default"] * 2
    with torch.no_grad(), Products() as asked:
        assert torch.equal(gm(x), model(x))  # inference keeps the bits of the model
    assert asked.called and "linear_pointwise" not in asked.called


def test_no_pass_elsewhere(monkeypatch):
    monkeypatch.setattr(products, "mkl_leaves_avx512", lambda: False)
    gm = trace(Small(), torch.randn(2, T, K))
    Pipeline(Canonicalize(), ChooseKernels()).run(gm)
    assert not any("lorafx" in str(node.target) for node in gm.graph.nodes)


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_a_model_trains_alike(targets):
    """Of the widths that go by oneDNN; gradients of float32 against those of float64."""
    config = {"r": 4, "target_modules": targets, "init_lora_weights": False}
    ids = torch.randint(0, 50, (4, 80))
    results = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        sizes = {"hidden_size": 96, "intermediate_size": 112, "vocab_size": 120, "max_position_embeddings": 128}
        base = llama(num_hidden_layers=1, **sizes)
        lora = lorafx.compile(base.to(dtype), config, backend="eager", random_state=0).train()
        with Products() as asked:
            lora(input_ids=ids, labels=ids).loss.backward()
        assert ("linear_pointwise" in asked.called) == (dtype == torch.float32)
        results.append({name: p.grad for name, p in lora.named_parameters() if p.grad is not None})
    found, exact = results
    assert found.keys() == exact.keys() and found
    for name, gradient in exact.items():
        near(found[name], gradient.double(), 64 * 320)
