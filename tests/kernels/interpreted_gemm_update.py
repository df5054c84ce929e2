"""The kernel of `gemm_update` in Triton's interpreter; tests/test_gemm_update.py runs this with TRITON_INTERPRET=1.

Triton must not have been imported before that is set, so it is a process of its own.
"""

from __future__ import annotations

import importlib
from contextlib import contextmanager

import pytest
import torch
import triton
from graphs import Chain
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lorafx
from lorafx.ops.lora_linear import reference as linear_reference
from lorafx.ops.lora_linears import reference as linears_reference
from lorafx.passes import FuseLora

module = importlib.import_module("lorafx.ops.gemm_update")
update, linear, linears = torch.ops.lorafx.gemm_update, torch.ops.lorafx.lora_linear, torch.ops.lorafx.lora_linears
eps = torch.finfo(torch.float32).eps
PASSES = lorafx.Pipeline(*(FuseLora("triton") if p.name == "fuse_lora" else p for p in lorafx.passes.default))


@contextmanager
def launches():
    """A list that grows by one with each run of the kernel."""
    kernel, seen = module.kernel(), []
    kernel.run = lambda *args, **kwargs: seen.append(1) or type(kernel).run(kernel, *args, **kwargs)
    try:
        yield seen
    finally:
        del kernel.run


def made(m: int, k: int, n: int, rank: int, dtype: torch.dtype, bias: bool, layout: str) -> tuple:
    """The arguments of a call, in one of three layouts of memory."""
    torch.manual_seed(m + rank)

    def tensor(rows: int, columns: int) -> Tensor:
        if layout == "transposed":
            return torch.randn(columns, rows).to(dtype).t()
        if layout == "part":  # every other column of some within a wider matrix
            return torch.randn(rows + 2, 2 * columns + 3).to(dtype)[1:-1, 2 : 2 * columns + 2 : 2]
        return torch.randn(rows, columns).to(dtype)

    vector = torch.randn(2 * n).to(dtype)[::2] if bias else None
    return tensor(m, k), tensor(k, n), vector, tensor(m, rank), tensor(rank, n), 1.7


def assert_within_rounding(found: Tensor, *given) -> None:
    """Each element: the sum in float32, of as many terms as there are, and one rounding to the dtype."""
    x, weight, bias, hidden, low, scaling = (a.double() if isinstance(a, Tensor) else a for a in given)
    exact = module.reference(x, weight, bias, hidden, low, scaling)
    terms = module.reference(
        *(a.abs() if isinstance(a, Tensor) else a for a in (x, weight, bias, hidden, low, scaling))
    )
    bound = torch.finfo(found.dtype).eps * exact.abs() + (x.shape[1] + hidden.shape[1] + 3) * eps * terms
    assert ((found - exact).abs() <= bound).all()


SIZES = [(50, 70, 45), (1, 33, 65), (97, 16, 32), (64, 64, 64)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("rank", [1, 8, 20, 64, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_the_equation(sizes, rank, dtype):
    for layout, bias in (("rows", True), ("transposed", False), ("part", True)):
        given = made(*sizes, rank, dtype, bias, layout)
        assert module.runs(*given[:-1])
        found = update(*given)
        assert found.dtype == dtype and found.is_contiguous()
        assert_within_rounding(found, *given)


@pytest.mark.parametrize("blocks", module._BLOCKS, ids=str)
def test_every_size_of_block_covers_ragged_matrices(blocks, monkeypatch):
    names = dict(zip(("ROWS", "COLUMNS", "DEPTH"), blocks))
    one = triton.autotune([triton.Config({**names, "GROUP": 8})], [])(module.kernel().fn)
    monkeypatch.setattr(module, "kernel", lambda: one)
    for m, group in ((70, "one group of rows"), (9 * blocks[0] + 5, "a second that is not full")):
        given = made(m, 70, blocks[1] + 9, 20, torch.bfloat16, True, "transposed")
        assert_within_rounding(update(*given), *given), group


def test_nothing_to_compute():
    given = made(0, 8, 5, 2, torch.float32, True, "rows")
    assert update(*given).shape == (0, 5)
    x, weight, bias, hidden, low, scaling = made(3, 8, 5, 2, torch.float32, True, "rows")
    torch.testing.assert_close(update(x[:, :0], weight[:0], bias, 0 * hidden, low, scaling), bias.expand(3, 5))


def test_what_the_kernel_does_not_know_is_the_librarys():
    given = made(5, 8, 6, 2, torch.float64, True, "rows")
    assert not module.runs(*given[:-1])
    torch.testing.assert_close(update(*given), module.reference(*given), rtol=0, atol=0)
    x, weight, *_ = made(5, 8, 6, 2, torch.float32, True, "rows")
    assert module.runs(x, weight) and not module.runs(x, weight.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert not module.runs(x, weight)


def test_flops_are_counted():
    with FlopCounterMode(display=False) as counter:
        update(*made(5, 8, 6, 2, torch.float32, True, "rows"))
    assert counter.get_total_flops() == 2 * 5 * 6 * (8 + 2)


# --- the operators of adapted linears --------------------------------------------------------------------------------


def one(rank=20, bias=True, apart=False, dtype=torch.float32) -> tuple:
    torch.manual_seed(0)
    x, z = (torch.randn(3, 17, 40).to(dtype) for _ in range(2))
    tensors = torch.randn(50, 40), torch.randn(50) if bias else None
    small = torch.randn(rank, 40), torch.randn(50, rank)
    weight, vector, lora_A, lora_B = (t if t is None else t.to(dtype) for t in (*tensors, *small))
    return x, weight, vector, z if apart else None, lora_A, lora_B, 0.7


def several(dtype=torch.float32) -> tuple:
    torch.manual_seed(0)

    def made(*sizes):
        return torch.randn(*sizes).to(dtype)

    weights, biases = [made(50, 40), made(33, 40), made(20, 40)], [None, made(33), made(20)]
    lora_As, lora_Bs = ([made(r, 40) for r in (8, 20, 1)], [made(n, r) for n, r in ((50, 8), (33, 20), (20, 1))])
    return made(3, 17, 40), weights, biases, lora_As, lora_Bs, [0.7, 1.3, 2.0]


CASES = {
    **{f"rank {r}": (linear, linear_reference, one(r)) for r in (1, 8, 20, 64)},
    "no bias": (linear, linear_reference, one(bias=False)),
    "dropout": (linear, linear_reference, one(apart=True)),
    "several": (linears, linears_reference, several()),
}


def leaves(given, dtype=None):
    """Copies of the arguments that ask for gradients, and the tensors among them."""
    found: list[Tensor] = []

    def copy(value):
        if isinstance(value, list):
            return [copy(each) for each in value]
        if not isinstance(value, Tensor):
            return value
        found.append(value.detach().to(dtype or value.dtype, copy=True).requires_grad_())
        return found[-1]

    return [copy(value) for value in given], found


def outcome(op, given, *rest, dtype=None, second=False):
    """Outputs and gradients, and derivatives of these, of a function that is not linear."""
    arguments, tensors = leaves(given, dtype)
    outputs = op(*arguments, *rest)
    outputs = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
    loss = sum((0.05 * o).sin().sum() for o in outputs)
    gradients = list(torch.autograd.grad(loss, tensors, create_graph=second))
    if second:
        gradients += torch.autograd.grad(sum(g.square().sum() for g in gradients), tensors)
    return [t.detach() for t in (*outputs, *gradients)]


def close(found, exact, tolerance):
    for a, b in zip(found, exact, strict=True):
        assert (a - b).norm() <= tolerance * b.norm(), f"{(a - b).norm() / b.norm()} of {tuple(b.shape)}"


LENGTH = 40 + 64 + 103 + 51  # of the products one after another: in, the largest rank, out in all, tokens


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_and_second_ones(case):
    op, reference, given = case
    with launches() as seen:
        found = outcome(op, given, "triton", second=True)
    # Forward, the input's gradient, and the same in the second derivative; with dropout there is nothing to add to dx.
    assert len(seen) == (5 if op is linears else 1 if isinstance(given[3], Tensor) else 3)
    close(found, outcome(reference, given, dtype=torch.float64, second=True), LENGTH * eps)
    close(found, outcome(op, given, second=True), 2 * LENGTH * eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op, given", [(linear, one), (linears, several)], ids=["one", "several"])
def test_half_precision(op, given, dtype):
    """At most four values in a row are rounded: h, y, the loss's gradient, g."""
    given = given(dtype=dtype)
    reference = linear_reference if op is linear else linears_reference
    found = outcome(op, given, "triton")
    close(found, outcome(reference, given, dtype=torch.float64), 4 * torch.finfo(dtype).eps)


def test_each_output_and_the_input_gradient_is_one_kernel():
    for op, given, outputs in ((linear, one(), 1), (linears, several(), 3)):
        arguments, tensors = leaves(given)
        with launches() as forward:
            result = op(*arguments, "triton")
        with launches() as backward:
            torch.autograd.grad(sum(o.sum() for o in (result if outputs > 1 else [result])), tensors[0])
        assert (len(forward), len(backward)) == (outputs, 1)


def test_outputs_that_nobody_used():
    """Their gradients are None; the kernel takes the first that is there."""
    for used in ([1], [2], [0, 2]):
        found, exact = [], []
        for result, op, rest, dtype in (
            (found, linears, ["triton"], None),
            (exact, linears_reference, [], torch.float64),
        ):
            arguments, tensors = leaves(several(), dtype)
            outputs = op(*arguments, *rest)
            loss = sum((0.05 * outputs[n]).sin().sum() for n in used)
            result += torch.autograd.grad(loss, tensors, materialize_grads=True)
        close(found, exact, LENGTH * eps)


def test_transforms_go_by_the_reference():
    x, weight, bias, _, lora_A, lora_B, scaling = one()
    exact = linear_reference(x, weight, bias, None, lora_A, lora_B, scaling)
    mapped = torch.vmap(lambda x: linear(x, weight, bias, None, lora_A, lora_B, scaling, "triton"))(x)
    close([mapped], [exact], LENGTH * eps)
    x = x.clone().requires_grad_()
    y = linear(x, weight, bias, None, lora_A, lora_B, scaling, "triton")
    several = torch.stack([torch.ones_like(y), 2 * torch.ones_like(y)])
    (batched,) = torch.autograd.grad(y, x, several, is_grads_batched=True, retain_graph=True)
    (first,) = torch.autograd.grad(y, x, several[0])
    close(batched, [first, 2 * first], LENGTH * eps)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compilers_see_one_operator(backend):
    for op, given in ((linear, one()), (linears, several())):
        compiled = torch.compile(op, backend=backend, fullgraph=True, dynamic=True)
        with launches() as seen:
            found = outcome(compiled, given, "triton")
        assert len(seen) == (4 if op is linears else 2)
        close(found, outcome(op, given), 2 * LENGTH * eps)


# --- a model ---------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """(…, 4) -> (…, 3): three linear layers of one value, one of another, and `Chain`'s two after dropout."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(4, 5, bias=False), nn.Linear(4, 3)
        self.d, self.chain = nn.Linear(5, 4), Chain()

    def forward(self, x):
        x = x.sin()
        return self.a(x) * self.c(x) + self.chain(self.d(self.b(x)))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_model_trains_as_by_default(backend):
    gradients, updates = [], []
    for passes in (PASSES, lorafx.passes.default):
        torch.manual_seed(0)
        config = {"target_modules": "all-linear", "r": 3, "init_lora_weights": False}
        lora = lorafx.compile(Small(), config, random_state=0, pipeline=passes, backend=backend)
        with launches() as seen:
            for tokens in (7, 40):
                x = torch.linspace(-2, 2, 4 * tokens).view(tokens, 4).requires_grad_()
                lora(x).sin().sum().backward()
        gradients.append([x.grad, *(p.grad for p in lora.parameters() if p.requires_grad)])
        updates.append(len(seen))
    assert updates == [2 * (6 + 4), 0]  # of two calls: six sites forward, four inputs backward
    close(gradients[0], gradients[1], LENGTH * eps)
