"""float8_lora_linears: layers in float8 with exact updates, their gradients, and what they keep for them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lorafx.ops.float8 import packed, quantised
from lorafx.ops.float8_lora_linears import reference

op = torch.ops.lorafx.float8_lora_linears
SCALINGS = [1.7, 0.5]


def leaf(*sizes):
    return torch.randn(*sizes, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def given():
    """Of (2, 5, 48): outputs 32 and 16, the second with a bias; two ranks."""
    torch.manual_seed(0)
    weights, scales = zip(*[packed(torch.randn(n, 48)) for n in (32, 16)])
    return {
        "x": leaf(2, 5, 48),
        "weights": list(weights),
        "scales": list(scales),
        "biases": [None, leaf(16)],
        "z": None,
        "lora_As": [leaf(2, 48), leaf(3, 48)],
        "lora_Bs": [leaf(32, 2), leaf(16, 3)],
    }


def run(given, **others):
    return op(*(given | others).values(), SCALINGS)


def expected(given, z=None):
    """The equations in float64, with updates that autograd derives; the base's part is a constant."""
    x, outputs = given["x"], []
    q, row_scale = quantised(x.detach())
    for at, scaling in enumerate(SCALINGS):
        dense = given["weights"][at].double() * given["scales"][at][:, None]
        update = F.linear(F.linear(x if z is None else z, given["lora_As"][at]), given["lora_Bs"][at])
        y = (q.double() * row_scale) @ dense.t() + scaling * update
        outputs.append(y if given["biases"][at] is None else y + given["biases"][at])
    return outputs


def leaves(given):
    return [given["biases"][1], *given["lora_As"], *given["lora_Bs"]]


def close(found, wanted):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_it_is_the_equations(given):
    wanted = expected(given)
    close(run(given), wanted)
    close(reference(*given.values(), SCALINGS), wanted)
    with torch.no_grad():
        close(run(given), wanted)


def test_gradients_of_adapters_are_exact_and_those_of_x_go_through_float8(given):
    x, dys = given["x"], [torch.randn(2, 5, n, dtype=torch.float64) for n in (32, 16)]
    found = torch.autograd.grad(run(given), (x, *leaves(given)), dys)
    wanted = torch.autograd.grad(expected(given), (x, *leaves(given)), dys)
    close(found[1:], wanted[1:])
    scaled = torch.cat([dy * scale for dy, scale in zip(dys, given["scales"])], -1)
    q, shared = quantised(scaled.flatten(0, 1))
    through = (q.double() * shared) @ torch.cat([weight.double() for weight in given["weights"]])
    close(found[:1], [wanted[0] + through.view_as(x)])


@pytest.mark.parametrize("used", [0, 1])
def test_who_is_not_used_has_no_gradient(given, used):
    run(given)[used].sum().backward()
    assert given["x"].grad is not None
    for role in ("lora_As", "lora_Bs"):
        assert given[role][used].grad is not None and given[role][1 - used].grad is None


def test_an_update_of_another_value_has_its_own_gradient(given):
    z, dys = leaf(2, 5, 48), [torch.randn(2, 5, n, dtype=torch.float64) for n in (32, 16)]
    close(run(given, z=z), expected(given, z))
    found = torch.autograd.grad(run(given, z=z), (z, *leaves(given)), dys)
    close(found, torch.autograd.grad(expected(given, z), (z, *leaves(given)), dys))


def test_dropout_is_before_the_adapters_alone(given):
    torch.manual_seed(1)
    found = op(*given.values(), SCALINGS, 0.5)
    torch.manual_seed(1)
    close(found, expected(given, F.dropout(given["x"], 0.5)))


def test_it_keeps_x_and_one_small_product(given):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run(given)
    assert [tuple(t.shape) for t in kept if len(t) == 10] == [(10, 48), (10, 5)]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_gradients_are_the_same(given, backend):
    compiled, wanted = torch.compile(run, backend=backend, fullgraph=True), [given["x"], *leaves(given)]
    found, plain = (torch.autograd.grad(sum(y.sin().sum() for y in f(given)), wanted) for f in (compiled, run))
    close(found, plain)
