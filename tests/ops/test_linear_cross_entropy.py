"""linear_cross_entropy: the equation, its gradients, and what chunks of rows must not change."""

from __future__ import annotations

import contextlib
import itertools
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from lorafx import ops  # noqa: F401, defines torch.ops.lorafx

fused = torch.ops.lorafx.linear_cross_entropy
module = sys.modules["lorafx.ops.linear_cross_entropy"]  # the package has the function under this name


def given(*, bias=True, lora=True, rows=(3, 5), dtype=torch.float64, ignored=3, width=4, classes=11):
    torch.manual_seed(0)

    def tensor(*sizes):
        return torch.randn(*sizes, dtype=torch.float64).to(dtype).requires_grad_()

    labels = torch.randint(0, classes, rows)
    labels.view(-1)[:ignored] = -100
    hidden, lora_B = (tensor(*rows, 2), tensor(classes, 2)) if lora else (None, None)
    return tensor(*rows, width), tensor(classes, width), tensor(classes) if bias else None, hidden, lora_B, 1.7, labels


def gradients(function, arguments, *options):
    own = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
    value = function(*arguments, *options)
    return value.detach(), torch.autograd.grad(value * 1.3, own)


@pytest.fixture
def unread(small_chunks, monkeypatch):
    """A CPU taken for a device whose labels the host may not look at, in chunks of 4 rows."""
    monkeypatch.setattr(module, "_is_readable", lambda labels: False)
    monkeypatch.setattr(module, "ROWS", 4)


@pytest.fixture(params=["small_chunks", "unread"])
def chunks(request):
    """Of rows that count, or of all rows."""
    return request.getfixturevalue(request.param)


OPTIONS = list(itertools.product([1, 2], [-100], [0.0, 0.2], [None, 2.0], [1.0, 0.3]))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_equation_and_all_gradients(chunks, lora, bias, options):
    """float64; 12 of 15 rows in three chunks, products of sums over at most 15."""
    arguments = given(lora=lora, bias=bias)
    value, found = gradients(fused, arguments, *options)
    expected, wanted = gradients(module.reference, arguments, *options)
    assert abs(value - expected) <= 1e-13 * abs(expected)
    for gradient, reference in zip(found, wanted, strict=True):
        assert (gradient - reference).abs().max() <= 1e-13 * reference.abs().max()


@pytest.mark.parametrize("rows, ignored", [((9,), 0), ((4,), 0), ((5,), 1), ((1,), 0), ((2, 3, 1), 2)])
def test_any_number_of_rows(chunks, rows, ignored):
    arguments = given(rows=rows, ignored=ignored)
    value, found = gradients(fused, arguments)
    expected, wanted = gradients(module.reference, arguments)
    assert torch.allclose(value, expected, rtol=1e-13, atol=0)
    assert all(torch.allclose(g, w, rtol=1e-12, atol=1e-13) for g, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("rows, chunks", [(1, [4, 4, 4]), (6, [6, 6]), (100, [12])])
def test_a_chunk_holds_as_many_logits_as_it_may_and_no_fewer_rows_than_it_must(small_chunks, monkeypatch, rows, chunks):
    found, chunk = [], module._chunk
    monkeypatch.setattr(module, "_chunk", lambda chosen, *rest: found.append(len(chosen)) or chunk(chosen, *rest))
    arguments = given(rows=(12,), ignored=0)
    monkeypatch.setattr(module, "_CHUNK", rows * arguments[1].shape[0])
    gradients(fused, arguments)
    assert found == chunks


@pytest.mark.parametrize("reduction", [1, 2])
@pytest.mark.parametrize("rows, ignored", [((0,), 0), ((5,), 5)])
def test_no_row_counts(chunks, rows, ignored, reduction):
    """As torch: the mean is nan, the sum is 0, gradients are 0."""
    arguments = given(rows=rows, ignored=ignored)
    value, found = gradients(fused, arguments, reduction)
    expected, wanted = gradients(module.reference, arguments, reduction)
    assert torch.equal(value, expected) or (value.isnan() and expected.isnan())
    assert all(torch.equal(g, w) for g, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_whatever_is_in_a_row_that_does_not_count(chunks, smoothing):
    """As in a padded one, which attention without a key may fill with NaNs."""
    x, weight, bias, *rest, labels = given(lora=False)
    x.data.view(-1, x.shape[-1])[:3] = torch.nan
    frozen = weight.detach(), bias.detach(), *rest, labels
    value, (found,) = gradients(fused, (x, *frozen), 1, -100, smoothing)
    expected, (wanted,) = gradients(
        module.reference, (x.detach().nan_to_num().requires_grad_(), *frozen), 1, -100, smoothing
    )
    assert torch.allclose(value, expected, rtol=1e-13, atol=0) and not found.view(-1, x.shape[-1])[:3].any()
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision(chunks, dtype):
    """Products round once to the dtype, gradients twice (g, and the product of g): a few eps of the largest sum."""
    arguments = given(dtype=dtype, rows=(6, 5), width=16)
    exact = [
        a.detach().double().requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments
    ]
    value, found = gradients(fused, arguments, 1, -100, 0.1, 3.0, 0.5)
    expected, wanted = gradients(module.reference, exact, 1, -100, 0.1, 3.0, 0.5)
    eps = torch.finfo(dtype).eps
    assert value.dtype == torch.float32
    assert abs(value - expected) <= 4 * eps * abs(expected)
    for gradient, reference in zip(found, wanted, strict=True):
        assert gradient.dtype == dtype
        assert (gradient - reference).abs().max() <= 8 * eps * reference.abs().max()


def test_only_what_is_needed_is_computed(small_chunks):
    x, weight, bias, *rest = given(lora=False)
    frozen = weight.detach(), bias.detach()
    needs = [True, False, False, False, False]
    _, (found,) = torch.ops.lorafx.chunked_cross_entropy(x, *frozen, *rest, -100, 0.0, None, 1.0, needs, False)
    assert found.shape == x.shape
    with torch.no_grad():
        assert not fused(x, weight, bias, *rest).requires_grad


def test_backward_twice(small_chunks):
    arguments = given()
    loss = fused(*arguments)
    first, second = (torch.autograd.grad(loss, arguments[0], retain_graph=True)[0] for _ in range(2))
    third = torch.autograd.grad(loss, arguments[0], torch.tensor(3.0, dtype=torch.float64))[0]
    assert torch.equal(first, second) and torch.allclose(third, 3 * first, rtol=1e-15)


def test_a_second_derivative_is_refused(small_chunks):
    arguments = given()
    (gradient,) = torch.autograd.grad(fused(*arguments), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


def test_transforms_go_by_the_reference(small_chunks):
    arguments = given()
    value, wanted = gradients(module.reference, arguments)
    found = torch.func.grad(lambda x: fused(x, *arguments[1:]))(arguments[0].detach())
    assert torch.allclose(found * 1.3, wanted[0], rtol=1e-12, atol=1e-14)
    many = torch.vmap(lambda x: fused(x, *arguments[1:]))(torch.stack([arguments[0].detach()] * 2))
    assert torch.allclose(many, value.expand(2), rtol=1e-12)


def test_labels_of_a_byte(chunks):
    """torch's loss takes them. A byte that -100 wraps to is a class, and no row to ignore."""
    x, weight = torch.randn(3, 4), torch.randn(200, 4)
    labels = torch.tensor([5, 156, 199])
    wanted = F.cross_entropy(F.linear(x, weight), labels)
    found = fused(x, weight, None, None, None, 1.0, labels.to(torch.uint8))
    assert (found - wanted).abs() <= 8 * torch.finfo(torch.float32).eps * wanted


def test_as_many_labels_as_rows(small_chunks):
    *arguments, labels = given()
    with pytest.raises(ValueError, match="14 labels for 15 rows"):
        fused(*arguments, labels.view(-1)[:-1])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(small_chunks, backend):
    """One graph for all numbers of rows, the operator a node of it; the same bits, for it runs as it is."""
    torch._dynamo.reset()
    run = torch.compile(lambda *a: fused(*a, 1, -100, 0.1, 3.0, 0.5), backend=backend, fullgraph=True, dynamic=True)
    for rows in ((3, 5), (2, 7)):
        arguments = given(rows=rows)
        value, found = gradients(run, arguments)
        expected, wanted = gradients(fused, arguments, 1, -100, 0.1, 3.0, 0.5)
        assert torch.allclose(value, expected, rtol=1e-14)
        assert all(torch.allclose(g, w, rtol=1e-13, atol=1e-15) for g, w in zip(found, wanted, strict=True))


def test_under_autocast(small_chunks):
    x, weight, bias, *rest, labels = given(dtype=torch.float32, lora=False)
    low = [t.detach().bfloat16().requires_grad_() for t in (x, weight, bias)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fused(x, weight, bias, *rest, labels)
    assert loss.dtype == torch.float32 and torch.equal(loss, fused(*low, *rest, labels))
    assert torch.autograd.grad(loss, weight)[0].dtype == torch.float32


def test_a_mean_is_divided_before_it_is_rounded():
    """As autograd does it. By seven: by a power of two it would be exact. To multiply by an identity is exact."""
    x = torch.randn(7, 11).bfloat16().requires_grad_()
    labels = torch.randint(0, 11, (7,))
    fused(x, torch.eye(11).bfloat16(), None, None, None, 0.0, labels).backward()
    exact = x.detach().double().requires_grad_()
    F.cross_entropy(exact, labels).backward()
    rounded_once = torch.finfo(torch.bfloat16).eps / 2 * exact.grad.abs()
    assert ((x.grad.double() - exact.grad).abs() <= rounded_once * 1.001).all()


@pytest.mark.parametrize("wrong", [-1, 11])
def test_a_label_that_is_no_class_is_torchs_error(wrong):
    x, weight, *rest, labels = given()
    labels[0, 0] = wrong
    with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds"):
        fused(x, weight, *rest, labels)


def test_no_label_is_looked_at(unread, monkeypatch):
    """The fake tensors below refuse it, as is seen where labels may be looked at."""
    step_on_a_gpu_that_is_not_there()
    monkeypatch.setattr(module, "_is_readable", lambda labels: True)
    with pytest.raises(RuntimeError):
        step_on_a_gpu_that_is_not_there()


@pytest.mark.parametrize("mean", [True, False])
def test_no_label_is_looked_at_with_a_kernel(unread, monkeypatch, mean):
    kernels = pytest.importorskip("lorafx.ops.cuda.cross_entropy_kernel", reason="Triton is not for this platform")
    starts = Starts()
    monkeypatch.setattr(module, "has_cross_entropy_for", lambda products, labels: True)
    monkeypatch.setattr(kernels, "cross_entropy_of_a_row", starts)
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
    step_on_a_gpu_that_is_not_there(mean)
    assert starts.grids == [(4,), (4,), (4,), (3,)]
    assert starts.factors == [("cuda", torch.float32)] * 4  # which the kernel reads there


class Starts:
    """Stands for a kernel, and keeps the grids that it is started with, and where the factor of gradients is."""

    def __init__(self):
        self.grids, self.factors = [], []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **options: self.factors.append((args[4].device.type, args[4].dtype))


def step_on_a_gpu_that_is_not_there(mean=True):
    """A training step with fake tensors, which have no values that anybody could read."""
    arguments = given(dtype=torch.bfloat16)
    with FakeTensorMode(), torch.no_grad():
        tensors = [torch.empty(t.shape, dtype=t.dtype, device="cuda") if torch.is_tensor(t) else t for t in arguments]
        *rest, labels = tensors
        total, found = module._chunked(*rest, labels, -100, 0.1, 3.0, 0.5, [True] * 5, mean)
    assert [(g.shape, g.dtype, g.device.type) for g in (total, *found)] == [
        ((), torch.float32, "cuda"),
        *((t.shape, torch.bfloat16, "cuda") for t in rest if torch.is_tensor(t)),
    ]
