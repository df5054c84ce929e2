"""float8_linear: the equation on rounded operands, its gradient, and what it keeps for that."""

from __future__ import annotations

import pytest
import torch

from lorafx.ops.float8 import packed, quantised
from lorafx.ops.float8_linear import reference

op = torch.ops.lorafx.float8_linear


def arguments(dtype=torch.float64):
    """Of (2, 5, 48) and 32 outputs, with a bias; and W as it is held."""
    torch.manual_seed(0)
    weight, scale = packed(torch.randn(32, 48))
    x, bias = torch.randn(2, 5, 48, dtype=dtype), torch.randn(32, dtype=dtype)
    return x.requires_grad_(), weight, scale, bias.requires_grad_()


def rounded(x):
    q, scale = quantised(x.detach())
    return q.double() * scale


@pytest.mark.parametrize("biased", [True, False])
def test_it_is_the_equation_on_rounded_operands(biased):
    x, weight, scale, bias = arguments()
    expected = rounded(x) @ (weight.double() * scale[:, None]).t() + (bias if biased else 0)
    given = x, weight, scale, bias if biased else None
    for y in (op(*given), op(*[t if t is None else t.detach() for t in given]), reference(*given)):
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12, check_dtype=True)


def test_in_bfloat16_it_is_off_by_one_rounding():
    x, weight, scale, bias = arguments(torch.bfloat16)
    without = rounded(x) @ (weight.double() * scale[:, None]).t()
    y, eps = op(x, weight, scale, bias), torch.finfo(torch.bfloat16).eps
    assert y.dtype == torch.bfloat16
    off = (y.double() - without - bias.double()).abs()
    assert (off <= eps * (without.abs() + y.double().abs()) + 1e-4).all()


def test_its_gradients_are_products_of_rounded_gradients():
    x, weight, scale, bias = arguments()
    dy = torch.randn(2, 5, 32, dtype=torch.float64)
    dx, d_bias = torch.autograd.grad(op(x, weight, scale, bias), (x, bias), dy)
    torch.testing.assert_close(dx, rounded(dy * scale) @ weight.double(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(d_bias, dy.sum((0, 1)), rtol=1e-12, atol=1e-12)
    exact = dy @ (weight.double() * scale[:, None])
    assert (dx - exact).norm() < exact.norm() / 16


def test_it_keeps_nothing_but_the_weight():
    x, weight, scale, bias = arguments()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        op(x, weight, scale, bias)
    assert [t.data_ptr() for t in kept] == [weight.data_ptr(), scale.data_ptr()]


def test_a_second_derivative_is_refused():
    x, weight, scale, bias = arguments()
    (dx,) = torch.autograd.grad(op(x, weight, scale, bias).sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_transforms_go_through():
    x, weight, scale, bias = [t.detach() for t in arguments()]
    several, given = torch.stack([x, 2 * x]), (weight, scale, bias)
    found = torch.vmap(lambda x: op(x, *given))(several)
    torch.testing.assert_close(found, torch.stack([op(each, *given) for each in several]))
    _, slope = torch.func.jvp(lambda x: op(x, *given), (x,), (torch.ones_like(x),))
    dense = weight.double() * scale[:, None]
    torch.testing.assert_close(slope, dense.sum(1).expand_as(slope))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_it_computes_the_same(backend):
    x, weight, scale, bias = arguments()
    compiled = torch.compile(op, backend=backend, fullgraph=True, dynamic=True)
    for rows in (x, torch.cat([x, x])):
        found, expected = compiled(rows, weight, scale, bias), op(rows, weight, scale, bias)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        gradients = [torch.autograd.grad(y.sin().sum(), (x, bias)) for y in (found, expected)]
        for a, b in zip(*gradients):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
