"""fuse_dropout: what dropout leaves of an adapter's input is made anew in backward."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from graphs import INSERT, Chain, adapted, run, text
from torch.utils.checkpoint import checkpoint

import lorafx
from lorafx.graph import ADAPTED_BY, SITE
from lorafx.ops import dropout
from lorafx.ops.lora_linear import reference
from lorafx.passes import ElideCasts, ElideDropout, FuseDropout, FuseLora

FUSED = (*INSERT, ElideCasts(), ElideDropout(), FuseLora())
fused = torch.ops.lorafx.lora_linear


def arguments(dtype=torch.float64, shape=(3, 5)):
    def tensor(*sizes):
        return torch.randn(*sizes, dtype=dtype, requires_grad=True)

    return tensor(*shape, 4), tensor(6, 4), tensor(6), None, tensor(2, 4), tensor(6, 2), 1.7


@pytest.fixture(params=[False, True], ids=["kept", "drawn again"])
def redraws(request, monkeypatch):
    """The mask is kept, as on a CPU, or drawn again, as on a GPU."""
    monkeypatch.setattr(dropout, "redraws", lambda x: request.param)
    return request.param


def seeded(*given, p=0.4):
    torch.manual_seed(3)
    return fused(*given, dropout=p)


def equation(x, weight, bias, _, lora_A, lora_B, scaling, p=0.4):
    """With torch's own dropout, and so PEFT's."""
    torch.manual_seed(3)
    return reference(x, weight, bias, torch.dropout(x, p, True), lora_A, lora_B, scaling)


def test_before_and_after():
    lora, x = adapted(Chain(), target_modules=["second"], lora_dropout=0.5), torch.randn(5, 2, 4)
    apart, joint = (run(lora, passes, x) for passes in (FUSED, (*FUSED, FuseDropout())))
    before, after = text(apart), text(joint)
    read = "relu, second_weight, second_bias, {}, second_lora_a_default_weight, second_lora_b_default_weight, 3.0"
    assert before[-2:] == [
        "dropout = dropout(relu, 0.5, True)",
        f"lora_linear = lorafx.lora_linear({read.format('dropout')})",
    ]
    assert after == [*before[:-2], f"lora_linear_1 = lorafx.lora_linear({read.format('None')}, dropout=0.5)"]
    marks = [next(iter(gm.graph.find_nodes(op="call_function", target=fused.default))).meta for gm in (apart, joint)]
    assert marks[0][SITE] == marks[1][SITE] and marks[0][ADAPTED_BY] == marks[1][ADAPTED_BY]


@pytest.mark.parametrize("shape", [(), (5,), (3, 5), (0, 5)])
def test_it_is_the_equation_with_the_same_random_numbers(redraws, shape):
    given = arguments(shape=shape)
    torch.testing.assert_close(seeded(*given), equation(*given), rtol=1e-13, atol=1e-13)
    wanted = [a for a in given if isinstance(a, torch.Tensor)]
    found, expected = (torch.autograd.grad(run(*given).sin().sum(), wanted) for run in (seeded, equation))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(seeded(*given), equation(*given), rtol=1e-13, atol=1e-13)


def test_what_lies_in_another_order_in_memory_is_dropped_as_it_was(redraws):
    """x is kept as a matrix; drawn for that, the numbers would come in the matrix's order."""
    x, *rest = arguments()
    x = x.detach().transpose(0, 1).requires_grad_()
    found, expected = (torch.autograd.grad(run(x, *rest).sin().sum(), [x, rest[3]]) for run in (seeded, equation))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradients_and_second_derivatives(redraws):
    given = arguments()
    assert torch.autograd.gradcheck(seeded, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(seeded, given, fast_mode=True)


@pytest.mark.parametrize("wanted", [0, 4, 5])
def test_only_what_is_asked_for_is_computed(redraws, wanted):
    given = [
        a.detach().requires_grad_(n == wanted) if isinstance(a, torch.Tensor) else a for n, a in enumerate(arguments())
    ]
    found, expected = (torch.autograd.grad(run(*given).sin().sum(), given[wanted]) for run in (seeded, equation))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_it_keeps_its_input_the_small_product_and_on_a_cpu_the_mask(redraws):
    kept, given = [], arguments(torch.float32)
    given[1].requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused(*given, dropout=0.4)
    found = [(t.dtype, tuple(t.shape)) for t in kept if len(t) == 15]
    mask = [(torch.bool, (15, 4))] if not redraws else []
    assert found == [*mask, (torch.float32, (15, 4)), (torch.float32, (15, 2))]


def test_backward_draws_no_numbers_of_anybody_else(redraws):
    y = seeded(*arguments())
    torch.rand(3)
    state = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_nothing_and_everything_may_be_left_out(p):
    x, weight, bias, _, lora_A, lora_B, scaling = given = arguments()
    expected = reference(x, weight, bias, x * (1 - p), lora_A, lora_B, scaling)
    torch.testing.assert_close(seeded(*given, p=p), expected, rtol=1e-13, atol=1e-13)


def test_half_precision(redraws):
    given = [a.bfloat16().detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments()]
    exact = [a.double().detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in given]
    y, expected = seeded(*given), equation(*exact)
    torch.testing.assert_close(y.double(), expected, rtol=2**-6, atol=2**-5)
    y.sum().backward()
    expected.sum().backward()
    for a, b in zip(given, exact):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a.grad.double(), b.grad, rtol=2**-6, atol=2**-4)


def test_transforms_go_by_torchs_dropout():
    x, weight, bias, _, lora_A, lora_B, scaling = (
        a.detach() if isinstance(a, torch.Tensor) else a for a in arguments()
    )

    def one(x):
        return fused(x, weight, bias, None, lora_A, lora_B, scaling, dropout=0.5)

    rows = torch.vmap(one, randomness="different")(x[:1].expand(64, 5, 4))
    assert len({tuple(row.flatten().tolist()) for row in rows}) > 32


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend):
    """A compiler draws itself: in the mean over many rows it is the equation without dropout."""
    x, weight, bias, _, lora_A, lora_B, scaling = arguments(torch.float32)
    x = x.detach()[:1, :1].expand(4000, 1, 4)
    given = x, weight, bias, None, lora_A, lora_B, scaling
    y = torch.compile(lambda: fused(*given, dropout=0.25), backend=backend, fullgraph=True)()
    expected = reference(*given)[0, 0]
    size = reference(x.abs(), torch.zeros_like(weight), None, None, lora_A.abs(), lora_B.abs(), scaling)[0, 0]
    assert ((y.mean(0)[0] - expected).abs() < 5 * size * (0.25 / 0.75 / 4000) ** 0.5).all()
    assert y.unique(dim=0).shape[0] > 4
    y.sum().backward()
    assert lora_A.grad.abs().max() > 0


@pytest.mark.slow
def test_a_model_trains_by_its_seed_and_alike_with_checkpointing(redraws):
    config = {"target_modules": "all-linear", "r": 2, "lora_dropout": 0.5, "init_lora_weights": False}
    lora = lorafx.compile(Chain().double(), config, random_state=0)
    x = torch.linspace(-1, 1, 28, dtype=torch.float64).view(7, 4).requires_grad_()
    gradients = []
    for call in (lora, lora, partial(checkpoint, lora, use_reentrant=False)):
        torch.manual_seed(1)
        lora.zero_grad()
        call(x).sin().sum().backward()
        gradients.append([p.grad for p in lora.parameters() if p.requires_grad])
    for others in gradients[1:]:
        assert all(map(torch.equal, gradients[0], others))
    drawn = [node.kwargs for node in lora.graph(x).graph.nodes if node.target is fused.default]
    assert drawn == [{"dropout": 0.5}] * 2
    assert not torch.equal(lora(x), lora(x)) and torch.equal(lora.eval()(x), lora(x))
