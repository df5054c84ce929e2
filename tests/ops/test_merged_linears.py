"""merged_linears: x (W + ΔW)ᵀ where that takes fewer multiplications, and the same numbers either way."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lorafx.ops import lora_linear, lora_linears, merged_linears

one, several = torch.ops.lorafx.lora_linear, torch.ops.lorafx.lora_linears
FEATURES_IN, OUTS, RANKS = 40, (24, 56), (2, 3)


def tensors(rows, dtype=torch.float64, count=1, grad=True):
    """x (rows, 40), then weight, bias, A and B of each of one or two sites with 24 and 56 outputs."""
    torch.manual_seed(0)
    shapes = [(rows, FEATURES_IN)]
    for features_out, rank in list(zip(OUTS, RANKS))[:count]:
        shapes += [(features_out, FEATURES_IN), (features_out,), (rank, FEATURES_IN), (features_out, rank)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_(grad) for shape in shapes]


def apply(x, *flat, merge=True):
    """The operator of one site, or of several that share x."""
    weights, biases, lora_As, lora_Bs = (list(flat[role::4]) for role in range(4))
    if len(weights) == 1:
        return (one(x, weights[0], biases[0], None, lora_As[0], lora_Bs[0], 1.7, merge=merge),)
    return tuple(several(x, weights, biases, lora_As, lora_Bs, [1.7, 0.5], merge=merge))


def with_gradients(given, dtype, **options):
    """Outputs, then gradients of everything, for fixed gradients of the outputs, all as float64."""
    given = [tensor.detach().to(dtype).requires_grad_() for tensor in given]
    outputs = apply(*given, **options)
    rng = torch.Generator().manual_seed(1)
    dys = [torch.randn(y.shape, generator=rng, dtype=torch.float64).to(torch.bfloat16).to(dtype) for y in outputs]
    return [each.double() for each in (*outputs, *torch.autograd.grad(outputs, given, dys))]


def of_sizes(given):
    """What rounding errors are bounded by: the same sums with every term positive."""
    given = [tensor.detach().double().abs() for tensor in given]
    outputs = apply(*(tensor.requires_grad_() for tensor in given), merge=False)
    rng = torch.Generator().manual_seed(1)
    dys = [torch.randn(y.shape, generator=rng, dtype=torch.float64).to(torch.bfloat16).double().abs() for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, given, dys)]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_outputs_and_gradients_are_exact_up_to_rounding(dtype, count, merges):
    given = tensors(200, dtype, count)
    found, expected = with_gradients(given, dtype), with_gradients(given, torch.float64, merge=False)
    assert merges == [200]
    # A sum of n products is off by up to n roundings of its terms. Half precision adds up in float32 and rounds what it
    # stores: W', a result (a sum of up to three), and h or dy B before it.
    longest = max(200, FEATURES_IN, sum(OUTS)) + sum(RANKS) + 3
    half = dtype.itemsize == 2
    off = longest * torch.finfo(torch.float32 if half else dtype).eps + 4 * half * torch.finfo(dtype).eps
    for a, b, size in zip(found, expected, of_sizes(given), strict=True):
        assert ((a - b).abs() <= off * size).all()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("shape", [(120,), (4, 30), (2, 3, 20)])
def test_first_and_second_derivatives(shape, count, merges):
    x, *rest = tensors(120, count=count)
    given = x.detach().view(*shape, FEATURES_IN).requires_grad_(), *rest
    assert [y.shape[:-1] for y in apply(*given)] == [shape] * count and merges
    assert torch.autograd.gradcheck(apply, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(apply, given, fast_mode=True)


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("wanted", range(9))
def test_only_what_is_asked_for_is_computed(wanted, used, merges):
    given = [tensor.detach().requires_grad_(n == wanted) for n, tensor in enumerate(tensors(500, count=2))]
    given[0] = given[0] + torch.zeros(1, dtype=torch.float64, requires_grad=True)  # each output has a gradient
    found, expected = (
        torch.autograd.grad(
            sum(outputs[n].sin().sum() for n in used), given[wanted], allow_unused=True, materialize_grads=True
        )[0]
        for outputs in (apply(*given), apply(*given, merge=False))
    )
    assert merges == [500]
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_what_is_not_its_own_is_not_written_to(merges):
    wide = torch.randn(120, 90, dtype=torch.float64)
    given = [wide[:, 7 : 7 + FEATURES_IN].requires_grad_(), *tensors(120, count=2)[1:]]
    given[1] = torch.randn(FEATURES_IN, OUTS[0], dtype=torch.float64).t().requires_grad_()
    before = [tensor.detach().clone() for tensor in (wide, *given)]
    outputs = apply(*given)
    dys = [torch.randn(*y.shape[::-1], dtype=torch.float64).t() for y in outputs]
    kept = [tensor.detach().clone() for tensor in (*outputs, *dys)]
    first, second = (torch.autograd.grad(outputs, given, dys, retain_graph=True) for _ in range(2))
    assert merges and all(map(torch.equal, first, second))
    assert all(map(torch.equal, (*outputs, *dys), kept)) and all(map(torch.equal, (wide, *given), before))


def test_it_keeps_its_input_and_no_weight_of_its_own(merges):
    kept, given = [], tensors(200, count=2)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        apply(*given)
    own = {tensor.untyped_storage().data_ptr() for tensor in given}
    assert merges and {tensor.untyped_storage().data_ptr() for tensor in kept} <= own


def test_transforms_go_by_the_reference(merges):
    x, *rest = tensors(200, count=2, grad=False)
    few = torch.stack([x[:3], 2 * x[:3]])
    expected = [apply(part, *rest, merge=False) for part in few]
    for found, *parts in zip(torch.vmap(lambda x: apply(x, *rest))(few), *expected):
        torch.testing.assert_close(found, torch.stack(parts))
    jacobian = torch.func.jacrev(lambda B: apply(x, *rest[:3], B, merge=False)[0].sum(0))(rest[3])
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        found = transform(lambda B: apply(x, *rest[:3], B)[0].sum(0))(rest[3])
        torch.testing.assert_close(found, jacobian)
    assert merges == []


def asking_for(gradients, rows, count):
    """Tensors, of which x, the As and the Bs need gradients if their letters are among `gradients`."""
    given = tensors(rows, torch.float32, count, grad=False)
    letters = "x" + "wbAB" * count
    return [tensor.requires_grad_(letter in gradients) for tensor, letter in zip(given, letters)]


def multiplications(given, order):
    def in_place(total, left, right, **options):  # which torch does not count by itself
        return 2 * left[0] * left[1] * right[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        outputs = order(*given)
        if any(tensor.requires_grad for tensor in given):
            torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    return counter.get_total_flops() // 2


def always(x, *flat):
    weights, biases, lora_As, lora_Bs = (list(flat[role::4]) for role in range(4))
    return merged_linears.linears(x, weights, biases, lora_As, lora_Bs, [1.7, 0.5][: len(weights)])


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("gradients", ["", "AB", "xAB", "xB", "x"])
def test_the_cheaper_order_is_chosen_by_what_torch_counts(gradients, count):
    chosen = set()
    for rows in (1, 14, 15, 16, 17, 23, 29, 30, 31, 35, 39, 40, 41, 45, 60, 100):
        given = asking_for(gradients, rows, count)
        merged, apart = multiplications(given, always), multiplications(given, lambda *g: apply(*g, merge=False))
        assert merged_linears.pays(given[0], given[3::4], given[4::4]) == (merged < apart), rows
        chosen.add(merged < apart)
    assert chosen == {False, True}


@pytest.mark.parametrize(
    "gradients, limit", [("", 15), ("AB", FEATURES_IN), ("xAB", 30)], ids=["inference", "first layer", "training"]
)
def test_limits_are_those_of_the_docstring(gradients, limit, merges):
    """n k / (n + k) = 24 · 40 / 64 = 15."""
    for rows in (limit, limit + 1):
        apply(*asking_for(gradients, rows, 1))
    assert merges == [limit + 1]
    with torch.no_grad():
        apply(*asking_for("xAB", 16, 1))
    assert merges == [limit + 1, 16]


def test_below_the_limit_it_is_the_ordinary_order_bit_by_bit(merges):
    given = tensors(20, torch.float32, 2)
    assert all(
        map(torch.equal, with_gradients(given, torch.float32), with_gradients(given, torch.float32, merge=False))
    )
    assert merges == []


def test_dropout_is_never_merged(merges):
    x, weight, bias, lora_A, lora_B = tensors(200)
    for ask in (torch.ops.lorafx.lora_linear, lora_linear):
        ask(x, weight, bias, 2 * x, lora_A, lora_B, 1.0, merge=True)
    assert merges == [] and lora_linears(x, [weight], [bias], [lora_A], [lora_B], [1.0], merge=True) and merges == [200]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "count"), [("aot_eager", 1), ("aot_eager", 2), ("inductor", 2)])
def test_compiled_gradients_and_one_compilation_for_each_side_of_the_limit(backend, count, merges):
    torch._dynamo.reset()
    compilations = []

    def compiler(gm, inputs):
        compilations.append(bool(merges))
        return torch._dynamo.lookup_backend(backend)(gm, inputs)

    compiled = torch.compile(lambda *given: apply(*given), backend=compiler, fullgraph=True, dynamic=True)
    for rows in (200, 300, 20, 10, 150):
        x, *rest = tensors(rows, count=count)
        given = [x, *map(nn.Parameter, rest)]  # as they are in a graph, so their sizes are constants
        found = torch.autograd.grad(sum(y.sin().sum() for y in compiled(*given)), given)
        expected = torch.autograd.grad(sum(y.sin().sum() for y in apply(*given, merge=False)), given)
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
        merges.clear()
    assert compilations == [True, False]
