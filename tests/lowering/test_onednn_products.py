"""onednn_products: compiled graphs multiply float32 as eager ones do, where MKL does not use what the processor has."""

from __future__ import annotations

import pytest
import torch
from torch._inductor import config
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

from lorafx import ops
from lorafx.lowering.backend import Backend
from lorafx.lowering.inductor import OurPasses
from lorafx.lowering.inductor.onednn_products import ProductsByOnednn
from lorafx.lowering.pieces import Piece
from lorafx.ops.cpu import products

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
product = torch.ops.lorafx.product.default
K, N, R = 130, 110, 16
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def avx512_left(monkeypatch):
    """A processor of which MKL does not use all, whatever this one is."""
    monkeypatch.setattr(products, "mkl_leaves_avx512", lambda: True)


def matrices(rows=170):
    """x (rows, K), W (K, N), h (rows, R), B (R, N), a bias."""
    return [torch.randn(sizes) for sizes in ((rows, K), (K, N), (rows, R), (R, N), (N,))]


def a_product(x, w, h, b, bias):
    return x @ w


def a_transposed_weight(x, w, h, b, bias):
    return torch.mm(x, w.t().contiguous().t()).relu()


def over_rows(x, w, h, b, bias):
    return (x @ w).t() @ x  # the wider first, of which the left is a view


def narrow_over_rows(x, w, h, b, bias):
    return torch.cat([x, x, x], 1).t() @ h


def an_update(x, w, h, b, bias):
    return torch.addmm(h @ b, x, w, beta=1.7, alpha=0.3).relu()


def a_bias(x, w, h, b, bias):
    return torch.addmm(bias, x, w)


def over_nothing(x, w, h, b, bias):
    return torch.addmm(torch.full_like(bias, torch.nan), x, w, beta=0, alpha=2)


def a_sum_of_two(x, w, h, b, bias):
    return torch.addmm(torch.addmm(h @ b, x, w), x, w * 2)


def in_double(x, w, h, b, bias):
    return (x.double() @ w.double()).float()


def a_small_one(x, w, h, b, bias):
    return h[:50] @ b


# How many products are large enough.
CASES = {
    a_product: 1,
    a_transposed_weight: 1,
    over_rows: 2,
    narrow_over_rows: 0,
    an_update: 1,
    a_bias: 1,
    over_nothing: 1,
    a_sum_of_two: 2,
    in_double: 0,
    a_small_one: 0,
}
cases = pytest.mark.parametrize("function", CASES, ids=lambda function: function.__name__)


def near(found, given, function):
    exact = function(*(each.double() for each in given))
    scale = exact.norm() / exact.numel() ** 0.5
    assert (found.double() - exact).abs().max() < 8 * EPS * 340**0.5 * scale * K**0.5


@pytest.mark.parametrize("mode", ["real", "symbolic"])
@cases
def test_large_products_of_float32(function, mode):
    given = matrices()
    gm = make_fx(function, tracing_mode=mode, _allow_non_fake_inputs=True)(*given)
    ProductsByOnednn()(gm.graph)
    gm.graph.lint()
    gm.recompile()
    assert len(gm.graph.find_nodes(op="call_function", target=product)) == CASES[function]
    before = [each.clone() for each in given]
    near(gm(*given), given, function)
    assert all(map(torch.equal, given, before))


def test_elsewhere_nothing_changes(monkeypatch):
    monkeypatch.setattr(products, "mkl_leaves_avx512", lambda: False)
    gm = make_fx(a_product)(*matrices())
    ProductsByOnednn()(gm.graph)
    assert not gm.graph.find_nodes(op="call_function", target=product)


def test_what_is_compiled_is_not_taken_from_another_kind_of_machine(monkeypatch):
    here = OurPasses().uuid()
    monkeypatch.setattr(products, "mkl_leaves_avx512", lambda: False)
    assert OurPasses().uuid() != here


def test_what_is_compiled_is_not_taken_from_other_formulas(tmp_path, monkeypatch):
    here = OurPasses().uuid()
    (tmp_path / "linear.py").write_text("y = 2 * x")
    monkeypatch.setattr(ops, "__file__", str(tmp_path / "__init__.py"))
    assert OurPasses().uuid() != here


def test_what_it_gives_is_what_compilers_were_told():
    x, w, h, _, _ = matrices()
    for left, right in ((x, w), (x.t(), torch.randn(170, N)), (torch.randn(170, 900).t(), h), (x[:, :100], w[:100])):
        torch.library.opcheck(product, (left, right), test_utils=("test_schema", "test_faketensor"))
        found = product(left, right)
        assert found.is_contiguous() and torch.allclose(found, left @ right, rtol=0, atol=64 * EPS * 170**0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "function", [a_product, over_rows, an_update, over_nothing, in_double], ids=lambda function: function.__name__
)
def test_inductor_calls_it(function, monkeypatch):
    """For sizes that it was compiled for and others."""
    monkeypatch.setenv("CI", "true")  # where Inductor refuses what it knows another way to do
    monkeypatch.setattr(config, "force_disable_caches", True)
    piece = Piece("", function, "inductor", Backend("inductor"))
    given, others = matrices(), matrices(rows=190)
    found, (code,) = run_and_get_code(piece.run, *given)
    assert code.count("torch.ops.lorafx.product.default(") == CASES[function]
    near(found, given, function)
    near(piece.run(*others), others, function)
