"""restore_norm: an RMS norm written by hand is one operator, whose own backward is the equation's."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from lorafx.capture.export import trace
from lorafx.ops.rms_norm import reference
from lorafx.passes import Canonicalize, ElideCasts, RestoreNorm
from lorafx.pipeline import Pipeline

fused = torch.ops.lorafx.rms_norm


class Norm(nn.Module):
    """As transformers writes it: computed in float32, rounded before or after the weight."""

    def __init__(self, weight_first=True, offset=None, dim=-1, wide=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))
        self.weight_first, self.offset, self.dim, self.wide = weight_first, offset, dim, wide

    def forward(self, x):
        h = x.to(torch.float32) if self.wide else x
        h = h * torch.rsqrt(h.pow(2).mean(self.dim, keepdim=True) + 1e-5)
        if self.offset is not None:
            return (h * (self.weight.to(h.dtype) + self.offset)).type_as(x)
        h = h.to(x.dtype)
        return self.weight * h if self.weight_first else h * self.weight


def restored(model, x):
    gm = trace(model, x)
    Pipeline(Canonicalize(), ElideCasts(), RestoreNorm()).run(gm)
    return gm


def norms(gm):
    return [node for node in gm.graph.nodes if node.target is fused.default]


def gradients(model, x, parameters):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x).double().sin().sum(), [x, *parameters])


@pytest.mark.parametrize(
    "model", [Norm(), Norm(weight_first=False), Norm(offset=1.0)], ids=["weight first", "weight last", "offset"]
)
@pytest.mark.parametrize("trains", [True, False])
def test_it_is_one_line(model, trains):
    model.requires_grad_(trains)
    x = torch.randn(2, 5, 6)
    gm = restored(model, x)
    (norm,) = norms(gm)
    assert norm.args[1] is not None and not gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
    x = torch.randn(3, 7, 6)
    torch.testing.assert_close(gm(x), model(x))
    parameters = [model.weight] if trains else []
    for found, expected in zip(gradients(gm, x, parameters), gradients(model, x, parameters)):
        torch.testing.assert_close(found, expected)


def test_in_half_precision_it_rounds_where_the_model_does():
    model = Norm().to(torch.bfloat16)
    x = torch.randn(2, 5, 6, dtype=torch.bfloat16)
    gm = restored(model, x)
    (norm,) = norms(gm)
    assert norm.args[1] is None and norm.meta["val"].dtype == torch.float32
    assert torch.equal(gm(x), model(x))


class WrittenTo(nn.Module):
    """(…, 6) -> (…, 6), of an x that is another when it is divided."""

    def forward(self, x):
        x = x * 1
        factor = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x.add_(1) * factor


@pytest.mark.parametrize(
    ("model", "dtype"),
    [(WrittenTo(), torch.float32), (Norm(dim=1), torch.float32), (Norm(wide=False), torch.bfloat16)],
    ids=["written to", "other axis", "computed in bfloat16"],
)
def test_others_stay(model, dtype):
    model, x = model.to(dtype), torch.randn(2, 6, 6, dtype=dtype)
    gm = restored(model, x)
    assert not norms(gm)
    assert torch.equal(gm(x), model(x))


def test_what_is_used_twice_stays():
    class Twice(Norm):
        def forward(self, x):
            r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
            return x * r + r

    assert not norms(restored(Twice(), torch.randn(4, 6)))


def test_a_weight_for_each_row_is_no_weight():
    class Rows(Norm):
        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight[:, None]

    model, x = Rows(), torch.randn(2, 6, 6)
    gm = restored(model, x)
    (norm,) = norms(gm)
    assert norm.args[1] is None
    torch.testing.assert_close(gm(x), model(x))


def arguments(weighted, dtype=torch.float64, shape=(2, 3, 5)):
    torch.manual_seed(0)
    x = torch.randn(*shape, dtype=dtype, requires_grad=True)
    return x, torch.randn(shape[-1], dtype=dtype, requires_grad=True) if weighted else None, 1e-3


@pytest.mark.parametrize("weighted", [True, False])
def test_it_is_the_equation(weighted):
    given = arguments(weighted)
    torch.testing.assert_close(fused(*given), reference(*given), rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(fused, given, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(fused, given)


@pytest.mark.parametrize("width", [7, 512, 4096])
def test_float32_is_as_near_to_float64_as_the_operators_apart(width):
    """A row's sum of squares is off by width · 2⁻²⁴ at most; the mean of products in the gradient likewise."""
    given = arguments(True, torch.float32, (4, width))
    exact = [g.detach().double().requires_grad_() for g in given[:2]]
    dy = torch.randn(4, width)
    found = [fused(*given), *torch.autograd.grad(fused(*given), given[:2], dy)]
    expected = [reference(*exact, 1e-3), *torch.autograd.grad(reference(*exact, 1e-3), exact, dy.double())]
    for f, e in zip(found, expected):
        assert (f - e).norm() / e.norm() <= 2**-24 * (width**0.5 + 4)


def test_what_it_is_given_is_not_written_to():
    x = torch.randn(5, 12)[:, 3:9].requires_grad_()
    weight, dy = torch.randn(6, requires_grad=True), torch.randn(6, 5).t()
    before = [tensor.detach().clone() for tensor in (x, weight, dy)]
    y = fused(x, weight, 1e-5)
    for _ in range(2):
        y.backward(dy, retain_graph=True)
    for now, then in zip((x, weight, dy), before):
        assert torch.equal(now, then)


def test_it_keeps_its_input_alone():
    kept = []
    x, weight, _ = arguments(True, torch.float32, (64, 32))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused(x, weight.detach(), 1e-5)
    assert sum(t.numel() for t in kept) == 64 * 32 + 32 + 64


@pytest.mark.slow
def test_compiled_it_is_left_to_the_compiler():
    x, weight, eps = arguments(True, torch.float32)
    found = torch.compile(lambda *given: fused(*given, eps), backend="aot_eager", fullgraph=True)(x, weight)
    torch.testing.assert_close(found, reference(x, weight, eps))
    for f, e in zip(*(torch.autograd.grad(y.sin().sum(), (x, weight)) for y in (found, reference(x, weight, eps)))):
        torch.testing.assert_close(f, e)


def test_autocast_changes_nothing_as_it_changes_no_norm_by_hand():
    """CPU autocast runs inner products in bfloat16, and powers, means and roots in float32."""
    x, weight, _ = arguments(True, torch.float32, (64, 512))
    dy, found = torch.randn(64, 512), []
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = fused(x, weight, 1e-5)
            found.append((y, *torch.autograd.grad(y, (x, weight), dy)))
    for outside, inside in zip(*found):
        assert torch.equal(outside, inside)


def test_each_thread_keeps_its_own_autocast(monkeypatch):
    """One that leaves a norm while another is within it, too."""
    within, plain = threading.Barrier(2, timeout=30), torch.linalg.vecdot
    monkeypatch.setattr(torch.linalg, "vecdot", lambda a, b: (within.wait(), plain(a, b))[1])
    x, weight, _ = arguments(True, torch.float32)
    after = {}

    def run(autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            fused(x, weight, 1e-5)
            after[autocast] = torch.is_autocast_enabled("cpu")

    threads = [threading.Thread(target=run, args=(autocast,)) for autocast in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert after == {True: True, False: False}
