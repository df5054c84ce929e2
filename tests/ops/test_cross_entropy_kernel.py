"""The kernel of the cross entropy, by Triton's interpreter, and on a GPU if there is one; and compiled without one."""

from __future__ import annotations

import re
import sys
from typing import NamedTuple

import pytest
import torch
from torch.nn import functional as F

from lorafx.ops.cuda import cross_entropy

triton = pytest.importorskip("triton", reason="Triton is not for this platform")
KERNEL = "lorafx.ops.cuda.cross_entropy_kernel"
BLOCK = 128  # the smallest
needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
HIGHEST, FACTOR, UNTOUCHED = 16.0, 0.37, 7.0


class Case(NamedTuple):
    classes: int
    dtype: torch.dtype = torch.float32
    smoothing: float = 0.0
    softcap: float | None = None
    scale: float = 1.0
    counted: int = 3
    needed: bool = True
    block: int = BLOCK


CASES = {
    "less than a block": Case(5),
    "one class": Case(1),
    "a block": Case(128, torch.bfloat16),
    "a block and a class": Case(129),
    "smoothing": Case(300, smoothing=0.2),
    "soft cap": Case(300, softcap=2.0),
    "a soft cap far above all logits": Case(300, softcap=500.0),
    "scale": Case(129, scale=0.3),
    "everything": Case(300, torch.float32, 0.1, 3.0, 0.5),
    "everything in bfloat16": Case(300, torch.bfloat16, 0.1, 3.0, 0.5),
    "everything in float16": Case(300, torch.float16, 0.1, 3.0, 0.5),
    "no row counts": Case(130, counted=0),
    "no gradient": Case(130, smoothing=0.1, needed=False),
    "blocks as they are": Case(8200, torch.bfloat16, block=8192),
}


def given(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Products and labels. There are NaNs in a row that does not count."""
    torch.manual_seed(0)
    products = (torch.randn(5, case.classes) * 3).clamp(-HIGHEST, HIGHEST).to(case.dtype)
    labels = torch.randint(0, case.classes, (5,))
    labels[case.counted :] = -100
    products[4] = torch.nan
    return products, labels


def expected(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and gradient by torch's own operators, in float64, and the numbers whose difference the gradient is."""
    products, labels = given(case)
    products = products.double().nan_to_num().requires_grad_()
    logits = products * case.scale
    if case.softcap is not None:
        logits = torch.tanh(logits / case.softcap) * case.softcap
    loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=case.smoothing)
    (gradient,) = torch.autograd.grad(loss * FACTOR, products)
    parts = logits.softmax(-1) + F.one_hot(labels.clamp(min=0), case.classes) + case.smoothing / case.classes
    return loss.detach(), gradient, parts.detach() * case.scale * FACTOR


def run(case: Case, device: str, monkeypatch) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel gives, and the memory of the products, whose rows have gaps between them."""
    monkeypatch.setattr(cross_entropy, "_BLOCK", case.block)
    products, labels = (tensor.to(device) for tensor in given(case))
    wide = torch.full((5, case.classes + 3), UNTOUCHED, dtype=case.dtype, device=device)
    wide[:, :-3] = products
    options = -100, case.smoothing, case.softcap, case.scale, torch.tensor(FACTOR, device=device), case.needed
    return cross_entropy.cross_entropy_in_place(wide[:, :-3], labels, *options).cpu(), wide.cpu()


INTERPRETING = {}  # modules as they are imported then


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_a_gpu)])
def device(request, monkeypatch):
    """A GPU, or a CPU where Triton interprets, which is decided when it is imported: so it is imported anew."""
    if request.param == "cuda":
        yield "cuda"
        return
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    compiling = taken_out()
    sys.modules.update(INTERPRETING)
    yield "cpu"
    INTERPRETING.update(taken_out())
    sys.modules.update(compiling)


def taken_out():
    """The modules of Triton, but for its library in C++, and of the kernel, which are imported no longer."""
    names = [name for name in sys.modules if name == KERNEL or (name + ".").startswith("triton.")]
    return {name: sys.modules.pop(name) for name in names if "._C" not in name}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_loss_and_its_gradient(device, case, monkeypatch):
    """Of float32: 2 |l| eps in an exponential, as much in sums and in a loss. The interpreter cuts bfloat16 off."""
    loss, wide = run(case, device, monkeypatch)
    exact, gradient, parts = expected(case)
    off, info = 8 * HIGHEST * torch.finfo(torch.float32).eps, torch.finfo(case.dtype)
    assert loss.dtype == torch.float32 and abs(loss - exact) <= case.counted * off
    assert (wide[:, -3:] == UNTOUCHED).all()
    if case.needed:
        rounded = info.eps * (gradient.abs() / (1 if device == "cpu" else 2) + info.smallest_normal)
        assert ((wide[:, :-3] - gradient).abs() <= off * parts + rounded).all()
        assert not wide[case.counted :, :-3].any()
    else:
        assert torch.equal(wide[:, :-3].nan_to_num(), given(case)[0].nan_to_num())


@needs_a_gpu
def test_it_gives_the_same_bits_each_time():
    products, labels = torch.randn(1000, 20_000, device="cuda"), torch.randint(0, 20_000, (1000,), device="cuda")
    rest = labels, -100, 0.1, 3.0, 1.0, torch.ones((), device="cuda"), True
    copies = [products.clone() for _ in range(5)]
    losses = [cross_entropy.cross_entropy_in_place(copy, *rest) for copy in copies]
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    assert all(torch.equal(copy, copies[0]) for copy in copies)


@pytest.mark.filterwarnings("ignore:invalid value")  # which numpy says of inf - inf
def test_logits_without_bounds(device, monkeypatch):
    """As torch: classes that are impossible count for nothing, and an infinite logit makes the loss nan."""
    monkeypatch.setattr(cross_entropy, "_BLOCK", BLOCK)
    products = torch.randn(3, 300)
    products[0, :200] = products[1, -1] = -torch.inf
    products[2, 7] = torch.inf
    labels, exact = torch.tensor([250, 3, 4]), products.clone().requires_grad_()
    for row, label in zip(exact, labels):
        F.cross_entropy(row, label).backward()
    rest = labels.to(device), -100, 0.0, None, 1.0, torch.ones((), device=device), True
    found = products.to(device)
    assert cross_entropy.cross_entropy_in_place(found, *rest).isnan()
    assert torch.allclose(found.cpu()[:2], exact.grad[:2], rtol=1e-5, atol=1e-7)
    assert found[2].isnan().any() and exact.grad[2].isnan().any()


@pytest.fixture(scope="module", params=[80, 90])
def compiled(request):
    """What Triton makes of the kernel for a GPU of some compute capability, as it is started for bfloat16."""
    from lorafx.ops.cuda.cross_entropy_kernel import cross_entropy_of_a_row

    types = {"products": "*bf16", "stride": "i32", "labels": "*i64", "losses": "*fp32", "factor": "*fp32"}
    types |= {"ignore_index": "i32", "smoothing": "fp32", "softcap": "fp32", "scale": "fp32"}
    known = {"CLASSES": 128_256, "CAPPED": True, "SMOOTHED": True, "WRITES": True, "BLOCK": 8192}
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(5)}
    source = triton.compiler.ASTSource(
        cross_entropy_of_a_row, types | dict.fromkeys(known, "constexpr"), known, aligned
    )
    target = triton.backends.compiler.GPUTarget("cuda", request.param, 32)
    return triton.compile(
        source, target=target, options={"num_warps": 16, "debug": True, "sanitize_overflow": False}
    ).asm


@pytest.mark.slow
def test_it_compiles_for_gpus_that_are_not_there(compiled):
    """Rows begin where 64 bits say, memory is accessed by 16 bytes, nothing is added up in an order of chance."""
    assert compiled["cubin"]
    assert re.search(r"arith\.muli .* : i64", compiled["ttir"])
    assert {"ld.global.v4.b32", "st.global.v4.b32"} <= set(re.findall(r"\w+\.global[.\w]*", compiled["ptx"]))
    assert not re.search(r"\b(atom|red)\.", compiled["ptx"])


@pytest.mark.slow
def test_a_label_that_is_no_class_is_the_one_thing_asserted(compiled):
    assert re.findall(r'tt\.assert .*"(.*)"', compiled["ttir"]) == ["a label is no class"]
    assert "__assertfail" in compiled["ptx"]
