"""restore_rotary: a rotary embedding written by hand is one operator, whose own backward is the equation's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorafx.capture.export import trace
from lorafx.ops.rotary import reference
from lorafx.passes import Canonicalize, ElideCasts, RestoreRotary
from lorafx.pipeline import Pipeline

fused = torch.ops.lorafx.rotary


def by_halves(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def by_places(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def by_unequal_parts(x):
    return torch.cat((-x[..., 2:], x[..., :2]), dim=-1)


def by_halves_of_another_axis(x):
    half = x.shape[-2] // 2
    return torch.cat((-x[..., half:, :], x[..., :half, :]), dim=-2)


def by_halves_before_a_write(x):
    turned = by_halves(x)
    x.add_(1)
    return turned


class Embedded(nn.Module):
    """(batch, 32), which is (batch, 4, 8), times angles: (4, 8), or (5, 1, 4, 8) for a result of another shape."""

    def __init__(self, turn, dtype=None, shape=(4, 8)):
        super().__init__()
        self.turn, self.dtype = turn, dtype
        self.register_buffer("angles", torch.randn(shape))

    def forward(self, x):
        x = x.unflatten(-1, (4, 8)) * 1
        cos, sin = self.angles.cos().to(x.dtype), self.angles.sin().to(self.dtype or x.dtype)
        turned = self.turn(x)
        return x * cos + turned * sin


def restored(model, x):
    gm = trace(model, x)
    Pipeline(Canonicalize(), ElideCasts(), RestoreRotary()).run(gm)
    return gm, [node for node in gm.graph.nodes if node.target is fused.default]


@pytest.mark.parametrize(("turn", "interleaved"), [(by_halves, []), (by_places, [True])])
def test_it_is_one_line(turn, interleaved):
    model, x = Embedded(turn), torch.randn(3, 32)
    gm, (node,) = restored(model, x)
    assert list(node.args[3:]) == interleaved
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.aten.neg.default)
    x = torch.randn(5, 32, requires_grad=True)
    torch.testing.assert_close(gm(x), model(x))
    found, expected = (torch.autograd.grad(run(x).sin().sum(), x) for run in (gm, model))
    torch.testing.assert_close(found, expected)


class OfNumbers(nn.Module):
    def forward(self, x):
        return x * 0.8 + by_halves(x) * 0.6


@pytest.mark.parametrize(
    "model",
    [
        Embedded(by_unequal_parts),
        Embedded(by_halves_of_another_axis),
        Embedded(by_halves_before_a_write),
        Embedded(by_halves, torch.float64),
        Embedded(by_halves, shape=(5, 1, 4, 8)),
        OfNumbers(),
    ],
    ids=["unequal parts", "another axis", "written to", "two dtypes", "another shape", "numbers"],
)
def test_others_stay(model):
    x = torch.randn(3, 32)
    gm, found = restored(model, x)
    assert not found and torch.equal(gm(x), model(x))


def arguments(dtype=torch.float64, trains=False):
    """Heads that are a transposed view, as attention has them; cosines and sines that differ within a pair."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 8, dtype=dtype).transpose(1, 2).requires_grad_()
    cos, sin = (torch.randn(1, 1, 5, 8, dtype=dtype, requires_grad=trains) for _ in range(2))
    return x, cos, sin


@pytest.mark.parametrize(("interleaved", "trains"), [(False, True), (True, False)])
def test_it_is_the_equation(interleaved, trains):
    given = *arguments(trains=trains), interleaved
    torch.testing.assert_close(fused(*given), reference(*given), rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(fused, given, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(fused, given, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_it_rounds_no_more_than_the_operators_apart(dtype, interleaved):
    """Two products and a sum, each rounded once to half of eps, of at most |x cos| + |turn(x) sin|."""
    x, cos, sin = arguments(dtype)
    dy = torch.randn_like(x)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, cos, sin)]
    found, expected = fused(x, cos, sin, interleaved), reference(*exact, interleaved)
    bound, straight = torch.finfo(dtype).eps, exact[0] * exact[1]
    assert ((found - expected).abs() <= 2 * bound * (straight.abs() + (expected - straight).abs())).all()
    (d_found,) = torch.autograd.grad(found, x, dy)
    (d_expected,) = torch.autograd.grad(expected, exact[0], dy.double())
    assert (d_found - d_expected).norm() <= bound * d_expected.norm() * 2


def test_what_it_is_given_is_not_written_to():
    x, cos, sin = arguments(torch.float32)
    dy = torch.randn(2, 3, 8, 5).transpose(2, 3)
    before = [tensor.detach().clone() for tensor in (x, cos, sin, dy)]
    y = fused(x, cos, sin)
    for _ in range(2):
        y.backward(dy, retain_graph=True)
    for now, then in zip((x, cos, sin, dy), before):
        assert torch.equal(now, then)


def test_it_keeps_no_tensor_of_its_inputs_size():
    kept = []
    x, cos, sin = arguments(torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused(x, cos, sin)
    assert [t.shape for t in kept] == [cos.shape, sin.shape]


@pytest.mark.slow
def test_compiled_it_is_left_to_the_compiler():
    x, cos, sin = arguments(torch.float32)
    found = torch.compile(lambda *given: fused(*given), backend="aot_eager", fullgraph=True)(x, cos, sin)
    torch.testing.assert_close(found, reference(x, cos, sin))
    for f, e in zip(*(torch.autograd.grad(y.sin().sum(), x) for y in (found, reference(x, cos, sin)))):
        torch.testing.assert_close(f, e)
