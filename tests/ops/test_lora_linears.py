"""lora_linears: the equations, their gradients, and what they keep for them."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorafx.ops.lora_linears import reference

shared = torch.ops.lorafx.lora_linears


def tensor(*sizes):
    return torch.randn(*sizes, dtype=torch.float64, requires_grad=True)


def arguments(scalings=(1.7, 0.5)):
    """Of (3, 5, 4): one with a bias, one without; two ranks."""
    torch.manual_seed(0)
    weights, biases = [tensor(6, 4), tensor(3, 4)], [None, tensor(3)]
    return tensor(3, 5, 4), weights, biases, [tensor(2, 4), tensor(3, 4)], [tensor(6, 2), tensor(3, 3)], list(scalings)


def flat(given):
    """A function of tensors alone, and these tensors."""
    x, weights, biases, lora_As, lora_Bs, scalings = given

    def function(x, w1, w2, bias, a1, a2, b1, b2, op=shared):
        return tuple(op(x, [w1, w2], [None, bias], [a1, a2], [b1, b2], scalings))

    return function, (x, *weights, biases[1], *lora_As, *lora_Bs)


@pytest.mark.parametrize("scalings", [(1.7, 0.5), (1.7, 1.7)], ids=str)
def test_it_is_the_equations(scalings):
    given = arguments(scalings)
    for found, expected in zip(shared(*given), reference(*given), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    function, tensors = flat(given)
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


class Multiplied(TorchDispatchMode):
    """How many operators multiply numbers, and no matrices."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket is torch.ops.aten.mul
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scalings", [(1.7, 0.5), (1.7, 1.7)], ids=str)
def test_a_scaling_is_no_kernel_of_its_own(scalings):
    x, weights, _, lora_As, lora_Bs, _ = given = arguments(scalings)
    single = torch.ops.lorafx.lora_linear(x, weights[0], None, None, lora_As[0], lora_Bs[0], scalings[1])
    leaves = [x, *lora_As, *lora_Bs]
    total = sum(y.sin().sum() for y in (*shared(*given), single))
    dys = [torch.ones_like(total)]
    with Multiplied() as multiplied:
        torch.autograd.grad(total, leaves, dys)
    assert multiplied.count == 3, "the derivatives of three sines"


@pytest.mark.parametrize("wanted", range(8))
@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)], ids=str)
def test_only_what_is_asked_for_is_computed(wanted, used):
    function, tensors = flat(arguments())
    leaves = [t.detach().requires_grad_(n == wanted) for n, t in enumerate(tensors)]
    leaves[0] = leaves[0] + torch.zeros(1, dtype=torch.float64, requires_grad=True)  # each output has a gradient
    found, expected = (
        torch.autograd.grad(sum(outputs[n].sin().sum() for n in used), leaves[wanted], materialize_grads=True)[0]
        for outputs in (function(*leaves), function(*leaves, op=reference))
    )
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_what_is_not_its_own_is_not_written_to():
    function, tensors = flat(arguments())
    wide = torch.randn(5, 9, dtype=torch.float64)
    tensors = (wide[:, 2:6].requires_grad_(), *tensors[1:])
    before = [t.clone() for t in (wide, *tensors)]
    outputs = function(*tensors)
    gradients = [torch.randn(*o.shape[::-1], dtype=torch.float64).t() for o in outputs]
    kept = [t.clone() for t in (*outputs, *gradients)]
    first, second = (torch.autograd.grad(outputs, tensors, gradients, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, (*outputs, *gradients), kept)) and all(map(torch.equal, (wide, *tensors), before))


def test_transforms_go_through():
    function, (x, *rest) = flat(arguments())
    x, rest = x.detach(), [t.detach() for t in rest]
    several = torch.stack([x, 2 * x])
    for found, first, second in zip(
        torch.vmap(lambda x: function(x, *rest))(several), *(function(one, *rest) for one in several)
    ):
        torch.testing.assert_close(found, torch.stack([first, second]))
    jacobian = torch.func.jacrev(lambda x: function(x, *rest, op=reference))(x)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(lambda x: function(x, *rest))(x), jacobian)


def test_it_keeps_its_input_and_one_small_product():
    kept = []
    function, tensors = flat(arguments())
    frozen = [t.detach() if t.shape[-1] == 4 and t.ndim == 2 and t.shape[0] != 2 else t for t in tensors]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        function(*frozen)
    assert [t.shape for t in kept if len(t) == 15] == [(15, 4), (15, 5)]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_gradients_are_the_equations(backend):
    function, tensors = flat(arguments())
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    found = torch.autograd.grad(sum(o.sin().sum() for o in compiled(*tensors)), tensors)
    expected = torch.autograd.grad(sum(o.sin().sum() for o in function(*tensors, op=reference)), tensors)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_who_is_not_used_has_no_gradient():
    """Not one of zeros, which an optimizer with weight decay would act upon."""
    x = torch.randn(3, 4, requires_grad=True)
    weights = [torch.randn(5, 4), torch.randn(6, 4)]
    lora_As = [torch.randn(2, 4, requires_grad=True) for _ in weights]
    lora_Bs = [torch.randn(len(weight), 2, requires_grad=True) for weight in weights]
    first, _ = torch.ops.lorafx.lora_linears(x, weights, [None, None], lora_As, lora_Bs, [1.0, 2.0])
    first.sum().backward()
    assert lora_As[0].grad is not None and lora_Bs[0].grad is not None
    assert lora_As[1].grad is None and lora_Bs[1].grad is None
