"""lora_linear: the equation, its gradients, and what it keeps for them."""

from __future__ import annotations

import pytest
import torch

from lorafx.ops import lora_linear, lora_linears
from lorafx.ops.lora_linear import reference

fused = torch.ops.lorafx.lora_linear


def arguments(apart=False, bias=True, shape=(3, 5), dtype=torch.float64):
    torch.manual_seed(0)

    def tensor(*sizes):
        return torch.randn(*sizes, dtype=dtype, requires_grad=True)

    z = tensor(*shape, 4) if apart else None
    return tensor(*shape, 4), tensor(6, 4), tensor(6) if bias else None, z, tensor(2, 4), tensor(6, 2), 1.7


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(), (5,), (3, 5), (2, 3, 1)])
def test_it_is_the_equation(apart, bias, shape):
    given = arguments(apart, bias, shape)
    torch.testing.assert_close(fused(*given), reference(*given), rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(fused, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(fused, given, fast_mode=True)


def test_only_what_is_asked_for_is_computed():
    given = arguments()
    for wanted in range(6):
        leaves = [
            a.detach().requires_grad_(n == wanted) if isinstance(a, torch.Tensor) else a for n, a in enumerate(given)
        ]
        if leaves[wanted] is None:
            continue
        (found,) = torch.autograd.grad(fused(*leaves).sin().sum(), leaves[wanted])
        (expected,) = torch.autograd.grad(reference(*leaves).sin().sum(), leaves[wanted])
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", [(5,), (3, 5)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_what_it_gives_may_be_written_to(shape, bias, shared):
    """As `nn.ReLU(inplace=True)` does after a layer."""
    x, weight, bias, _, lora_A, lora_B, scaling = arguments(bias=bias, shape=shape)

    def run(op):
        if not shared:
            return op(x, weight, bias, None, lora_A, lora_B, scaling).mul_(3).relu_()
        first, second = torch.ops.lorafx.lora_linears(
            x, [weight] * 2, [bias] * 2, [lora_A] * 2, [lora_B] * 2, [scaling] * 2
        )
        return first.mul_(3).relu_() + second.mul_(3).relu_()

    written = run(fused)
    expected = reference(x, weight, bias, None, lora_A, lora_B, scaling).relu() * (6 if shared else 3)
    torch.testing.assert_close(written, expected, rtol=1e-13, atol=1e-13)
    for found, wanted in zip(*(torch.autograd.grad(y.sum(), (x, weight, lora_A, lora_B)) for y in (written, expected))):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_what_is_not_its_own_is_not_written_to():
    """Rows of a wider matrix, and a transposed one; backward twice."""
    given = list(arguments())
    given[0] = torch.randn(5, 9, dtype=torch.float64)[:, 2:6].requires_grad_()
    given[1] = torch.randn(4, 6, dtype=torch.float64).t().requires_grad_()
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in given]
    output = fused(*given)
    gradient = torch.randn(6, 5, dtype=torch.float64).t()
    kept = output.clone(), gradient.clone()
    wanted = [a for a in given if isinstance(a, torch.Tensor)]
    first, second = (torch.autograd.grad(output, wanted, gradient, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second)) and torch.equal(output, kept[0]) and torch.equal(gradient, kept[1])
    assert all(torch.equal(a, b) for a, b in zip(given, before) if isinstance(a, torch.Tensor))


def test_transforms_go_through():
    x, weight, bias, _, lora_A, lora_B, scaling = (
        a.detach() if isinstance(a, torch.Tensor) else a for a in arguments()
    )
    rest = weight, bias, None, lora_A
    several = torch.stack([lora_B, 2 * lora_B])
    expected = torch.stack([reference(x, *rest, one, scaling) for one in several])
    torch.testing.assert_close(torch.vmap(lambda one: fused(x, *rest, one, scaling))(several), expected)
    jacobian = torch.func.jacrev(lambda x: reference(x, *rest, lora_B, scaling))(x)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(lambda x: fused(x, *rest, lora_B, scaling))(x), jacobian)


def test_it_keeps_its_input_and_the_small_product():
    kept = []
    given = arguments(dtype=torch.float32)
    given[1].requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused(*given)
    activations = [t.shape for t in kept if len(t) == 15]
    assert activations == [(15, 4), (15, 2)] and kept[0].data_ptr() == given[0].data_ptr()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_gradients_are_the_equations(backend):
    for apart in (False, True):
        given = arguments(apart)
        wanted = [a for a in given if isinstance(a, torch.Tensor)]
        compiled = torch.compile(fused, backend=backend, fullgraph=True)
        found = torch.autograd.grad(compiled(*given).sin().sum(), wanted)
        expected = torch.autograd.grad(reference(*given).sin().sum(), wanted)
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(4,), (1, 4), (1, 1, 4), (2, 4)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("apart", [True, False])
def test_a_single_row_is_computed_alike(shape, bias, apart):
    x, z = torch.randn(shape).double(), torch.randn(shape).double() if apart else None
    weight, A, B = torch.randn(6, 4).double(), torch.randn(2, 4).double(), torch.randn(6, 2).double()
    given = x, weight, torch.randn(6).double() if bias else None, z, A, B, 1.7
    found = lora_linear(*given)
    assert found.shape == (*shape[:-1], 6)
    torch.testing.assert_close(found, reference(*given), rtol=1e-13, atol=1e-13)
    spread = torch.randn(4, 3).double().t()[:1].expand(1, 4)  # no row in memory
    torch.testing.assert_close(
        lora_linear(spread, *given[1:3], None, A, B, 1.7), reference(spread, *given[1:3], None, A, B, 1.7)
    )


@pytest.mark.parametrize("rows", [1, 3])
def test_an_update_without_values_is_an_error(rows):
    lora_A, lora_B = torch.empty(2, 4, device="meta"), torch.empty(5, 2, device="meta")
    x, weight = torch.ones(rows, 4), torch.ones(5, 4)
    with pytest.raises(RuntimeError, match="holds no values"):
        lora_linear(x, weight, None, None, lora_A, lora_B, 1.0)
    with pytest.raises(RuntimeError, match="holds no values"):
        lora_linears(x, (weight, weight), (None, None), (lora_A, lora_A), (lora_B, lora_B), (1.0, 1.0))
