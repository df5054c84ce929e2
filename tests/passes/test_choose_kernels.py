"""choose_kernels: products in half precision go by way of float32 on a CPU that has no instructions for them."""

from __future__ import annotations

import sys

import pytest
import torch
from operators import ADAPTED, of_linear, of_lora_linear, of_lora_linears
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lorafx
from lorafx.capture.export import trace
from lorafx.ops import attention, linear, linear_cross_entropy
from lorafx.ops.cpu import half_precision, products
from lorafx.passes import Canonicalize, ChooseKernels
from lorafx.pipeline import Pipeline

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@pytest.fixture(autouse=True)
def slow_cpu(monkeypatch):
    """A CPU without instructions for half precision, and of which MKL uses all, whatever this one is."""
    monkeypatch.setattr(half_precision, "multiplies", lambda dtype: False)
    monkeypatch.setattr(products, "mkl_leaves_avx512", lambda: False)


def numbers(*sizes, scale=1.0):
    return (scale * torch.randn(*sizes)).bfloat16().to(torch.float16)  # numbers that both dtypes hold


def of_attention(x, W, b, A, B):
    heads = x.view(3, 11, 4, 9).transpose(1, 2)
    return attention(heads, heads.flip(2), heads.flip(1), is_causal=True)


OPERATORS = [*ADAPTED, of_linear, of_attention]


def outcome(function, given):
    """What a function of (3, 11, 36) gives, and the gradients of what it is given, in float64."""
    given = [tensor.clone().requires_grad_() for tensor in given]
    output = function(*given)
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(output.shape, generator=generator).bfloat16().to(output.dtype)
    found = torch.autograd.grad(output, given, dy, allow_unused=True)
    return [each.double() for each in (output, *found) if each is not None]


@HALF
@pytest.mark.parametrize("function", OPERATORS)
def test_products_are_rounded_once(function, dtype):
    torch.manual_seed(0)
    given = [numbers(3, 11, 36), numbers(7, 36), numbers(7), numbers(4, 36), numbers(7, 4)]
    found = outcome(function, [tensor.to(dtype) for tensor in given])
    expected = outcome(function, [tensor.double() for tensor in given])
    # half a step of what is rounded, or of h, which backward reads rounded; and the sums of float32
    step, sums = torch.finfo(dtype).eps, 36 * torch.finfo(torch.float32).eps
    for ours, exact in zip(found, expected, strict=True):
        off = (ours - exact).norm() / exact.norm()
        assert off < step / 2 + sums, (function.__name__, float(off / step))


@HALF
def test_so_is_the_loss_of_a_head(dtype):
    torch.manual_seed(0)
    x, W, labels = numbers(40, 36), numbers(50, 36, scale=0.2), torch.randint(0, 50, (40,))

    def function(x, W):
        return linear_cross_entropy(x, W, None, None, None, 1.0, labels)

    found = outcome(function, [x.to(dtype), W.to(dtype)])
    expected = outcome(function, [x.double(), W.double()])
    for ours, exact in zip(found, expected, strict=True):
        assert (ours - exact).norm() / exact.norm() < torch.finfo(dtype).eps


class Multiplied(TorchDispatchMode):
    """In which dtypes matrices are multiplied."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            self.dtypes.add(result.dtype)
        return result


@HALF
def test_the_loss_of_a_head_multiplies_in_float32(dtype):
    x, W, h, B = (torch.randn(sizes).to(dtype) for sizes in ((40, 36), (50, 36), (40, 4), (50, 4)))
    rest = 1.7, torch.randint(0, 50, (40,)), -100, 0.0, None, 1.0, [True] * 2 + [False] + [True] * 2, True
    with Multiplied() as products:  # in the function itself: a mode does not see into the operator
        sys.modules["lorafx.ops.linear_cross_entropy"]._chunked(x, W, None, h, B, *rest)
    assert products.dtypes == {torch.float32}


def test_half_precision_alone_is_widened_and_few_rows_are_not():
    x, W = torch.randn(2, 3, 8), torch.randn(6, 8)
    assert half_precision.pays(x.bfloat16()) and half_precision.pays(x.half())
    assert not any(map(half_precision.pays, (x, x.double(), x.bfloat16()[:1], x.bfloat16().to("meta"))))
    few = x[:1].bfloat16().requires_grad_()
    assert torch.equal(linear(few, W.bfloat16()), F.linear(few, W.bfloat16()))


def test_autocast_leaves_what_is_wide_as_it_is():
    torch.manual_seed(0)
    given = [tensor.bfloat16() for tensor in (numbers(3, 11, 36), numbers(7, 36), numbers(7))]
    given += [tensor.bfloat16() for tensor in (numbers(4, 36), numbers(7, 4))]
    for function in OPERATORS:
        plain = outcome(function, given)
        with torch.autocast("cpu", torch.bfloat16):
            cast = outcome(function, given)
        assert all(map(torch.equal, plain, cast)), function.__name__


@pytest.mark.parametrize("function", [of_lora_linear, of_lora_linears, of_linear, of_attention])
def test_nothing_wide_is_kept_for_backward(function):
    given = [torch.randn(3, 11, 36), torch.randn(7, 36), torch.randn(7), torch.randn(4, 36), torch.randn(7, 4)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        function(*(tensor.bfloat16().requires_grad_() for tensor in given))
    assert {tensor.dtype for tensor in kept if tensor.numel()} <= {torch.bfloat16}


@pytest.mark.parametrize("seed", range(3))
def test_attention_drops_the_same_numbers_in_backward(seed):
    query = torch.randn(2, 4, 8, 6).bfloat16().requires_grad_()
    value = torch.eye(8, dtype=torch.bfloat16).expand(2, 4, 8, 8).clone().requires_grad_()
    torch.manual_seed(seed)
    weights = attention(query, query, value, None, 0.5)  # the values being an identity, that is what comes out
    (d_value,) = torch.autograd.grad(weights, value, torch.ones_like(weights))
    expected = weights.double().sum(-2, keepdim=True).mT.expand_as(d_value)
    assert (weights == 0).any() and torch.allclose(d_value.double(), expected, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("function", OPERATORS)
def test_a_compiler_is_given_the_products_as_they_are(function):
    """It would keep wide copies for backward."""
    x, W, b = (torch.randn(sizes).bfloat16() for sizes in ((3, 11, 36), (36, 36), (36,)))
    A, B = torch.randn(4, 36).bfloat16(), torch.randn(36, 4).bfloat16()

    def trained(x, W, b, A, B):
        return torch.autograd.grad(function(x.requires_grad_(), W, b, A, B).sum(), x)

    called = [str(node.target) for node in make_fx(trained, tracing_mode="fake")(x, W, b, A, B).graph.nodes]
    assert len(called) > 7 and not any("_to_copy" in target for target in called), called


def test_second_derivatives():
    torch.manual_seed(0)
    x, W = numbers(11, 36), numbers(7, 36)

    def penalty(x, W):
        (dx,) = torch.autograd.grad(linear(x, W).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), W)[0].double()

    found = penalty(x.bfloat16().requires_grad_(), W.bfloat16().requires_grad_())
    exact = penalty(x.double().requires_grad_(), W.double().requires_grad_())
    assert (found - exact).norm() / exact.norm() < 8 * torch.finfo(torch.bfloat16).eps  # eight roundings on the way


class Attending(nn.Module):
    """(…, n, 12) -> (…, n, 5): a linear layer, attention over what it gives, and another one."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(12, 24), nn.Linear(24, 5, bias=False)

    def forward(self, x):
        q, k, v = self.into(x).unflatten(-1, (3, 8)).unbind(-2)
        return self.out(F.scaled_dot_product_attention(q, k, v, scale=0.3).repeat(1, 1, 3))


def rewritten(model, x):
    gm = trace(model, x)
    Pipeline(Canonicalize(), ChooseKernels()).run(gm)
    return gm, [str(node.target) for node in gm.graph.nodes if "lorafx" in str(node.target)]


def test_before_and_after():
    _, ours = rewritten(Attending().bfloat16(), torch.randn(2, 6, 12).bfloat16())
    assert ours == ["lorafx.linear.default", "lorafx.attention.default", "lorafx.linear.default"]
    assert not rewritten(Attending(), torch.randn(2, 6, 12))[1]


@pytest.mark.slow
def test_a_cpu_that_multiplies_half_precision_is_left_to_do_it_in_linear_layers(monkeypatch):
    monkeypatch.setattr(half_precision, "multiplies", lambda dtype: True)
    _, ours = rewritten(Attending().bfloat16(), torch.randn(2, 6, 12).bfloat16())
    assert ours == ["lorafx.attention.default"]


@pytest.mark.slow
def test_inference_keeps_the_bits_of_the_model():
    model, x = Attending().bfloat16(), torch.randn(2, 6, 12).bfloat16()
    gm, _ = rewritten(model, x)
    with torch.no_grad():
        assert torch.equal(gm(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_model_trains_alike(backend):
    torch.manual_seed(0)
    model, x = Attending().bfloat16(), torch.randn(2, 6, 12).bfloat16()
    config = {"r": 2, "target_modules": ["into"], "init_lora_weights": False}
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        adapted = lorafx.compile(
            Attending().to(dtype), config, backend=backend, autocast_adapter_dtype=False, random_state=0
        ).train()
        adapted.load_state_dict({**adapted.state_dict(), **{n: p.to(dtype) for n, p in model.state_dict().items()}})
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(len(name))
                parameter.data = (0.2 * torch.randn(parameter.shape, generator=generator)).bfloat16().to(dtype)
        adapted(x.to(dtype)).sin().sum().backward()
        results.append({n: p.grad.double() for n, p in adapted.named_parameters() if p.grad is not None})
    found, exact = results
    assert found.keys() == exact.keys() and found
    for name, gradient in exact.items():
        off = (found[name] - gradient).norm() / gradient.norm()
        assert off < 8 * torch.finfo(torch.bfloat16).eps, (name, off)
