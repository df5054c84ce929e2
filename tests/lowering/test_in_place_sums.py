"""in_place_sums: sums of products take the memory of the product that nobody else reads, and no other."""

import pytest
import torch
from torch._inductor import config
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

from lorafx.lowering.backend import Backend
from lorafx.lowering.inductor.in_place_sums import SumsInPlace
from lorafx.lowering.pieces import Piece
from lorafx.torch_private.inductor import POST_PASS

aten = torch.ops.aten
N, K, R = 6, 4, 2


def matrices(rows=5) -> list[torch.Tensor]:
    """x, W, another W, h, B and a row: y is (rows, N)."""
    shapes = (rows, K), (K, N), (K, N), (rows, R), (R, N), (1, N)
    return [torch.randn(shape) for shape in shapes]


def an_update(x, w, _, h, b, row):
    return torch.addmm(h @ b, x, w, beta=2.0).relu()


def a_sum_of_three(x, w, v, h, b, row):
    return torch.addmm(torch.addmm(h @ b, x, w), x, v).relu()


def a_view(x, w, _, h, b, row):
    return torch.addmm((h @ b).view(1, -1, N).view(-1, N), x, w).relu()


def read_again(x, w, _, h, b, row):
    product = h @ b
    return torch.addmm(product, x, w), product.relu()


def read_through_a_view(x, w, _, h, b, row):
    product = h @ b
    return torch.addmm(product.view(-1, N), x, w), product.relu()


def given_back(x, w, _, h, b, row):
    product = h @ b
    return torch.addmm(product, x, w), product


def a_factor_too(x, w, _, h, b, row):
    product = x @ x.t()
    return torch.addmm(product, product, product)


def an_input(x, w, _, h, b, row):
    return torch.addmm(row.new_zeros(len(x), N), x, w)


def expanded(x, w, _, h, b, row):
    return torch.addmm(h[:1] @ b, x, w)


def a_sum_read_again(x, w, v, h, b, row):
    first = torch.addmm(h @ b, x, w)
    return torch.addmm(first, x, v), first.relu()


def a_product_of_float8(x, w, _, h, b, row):
    left, right = x.to(torch.float8_e4m3fn), w.t().contiguous().to(torch.float8_e4m3fn).t()
    scale = x.new_ones(())
    return torch.addmm(aten._scaled_mm.default(left, right, scale, scale, None, None, x.dtype), h, b)


def a_product_times_a_number(x, w, v, h, b, row):
    return torch.addmm(row * torch.nan, w.t(), v, beta=0, alpha=2.0).relu()


CASES = {
    an_update: 1,
    a_product_of_float8: 1,
    a_sum_of_three: 2,
    a_view: 1,
    read_again: 0,
    read_through_a_view: 0,
    given_back: 0,
    a_factor_too: 0,
    an_input: 0,
    expanded: 0,
    a_sum_read_again: 1,
}


def require_products_of_float8(given):
    """Skip where oneDNN has none for this processor, as without AVX-512."""
    try:
        a_product_of_float8(*given)
    except RuntimeError as error:
        pytest.skip(f"this CPU has no product of float8: {error}")


@pytest.mark.parametrize("mode", ["real", "symbolic"])
@pytest.mark.parametrize("function", CASES, ids=lambda function: function.__name__)
def test_what_is_read_once_is_written_to(function, mode):
    given = matrices()
    if function is a_product_of_float8:
        require_products_of_float8(given)
    gm = make_fx(function, tracing_mode=mode, _allow_non_fake_inputs=True)(*given)
    SumsInPlace()(gm.graph)
    gm.graph.lint()
    gm.recompile()
    assert len(gm.graph.find_nodes(op="call_function", target=aten.addmm_.default)) == CASES[function]
    before = [t.clone() for t in given]
    torch.testing.assert_close(gm(*given), function(*given), rtol=0, atol=0)
    assert all(map(torch.equal, given, before))


@pytest.mark.parametrize(("mode", "count"), [("real", 1), ("symbolic", 0)])
def test_a_product_of_known_sizes_times_a_number_gets_memory_of_its_own(mode, count):
    gm = make_fx(a_product_times_a_number, tracing_mode=mode)(*(given := matrices()))
    SumsInPlace()(gm.graph)
    gm.graph.lint()
    gm.recompile()
    assert len(gm.graph.find_nodes(op="call_function", target=aten.addmm_.default)) == count
    torch.testing.assert_close(gm(*given), a_product_times_a_number(*given), rtol=0, atol=0)


@pytest.mark.parametrize("tuned", ["max_autotune", "max_autotune_gemm"])
def test_products_that_are_tuned_add_by_themselves(tuned):
    gm = make_fx(an_update, tracing_mode="fake")(*matrices())
    with config.patch({tuned: True}):
        SumsInPlace()(gm.graph)
    assert not gm.graph.find_nodes(op="call_function", target=aten.addmm_.default)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "count"),
    [(an_update, 1), (a_sum_of_three, 2), (read_again, 0), (a_sum_read_again, 1), (a_product_times_a_number, 1)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_inductor_reads_what_was_added(function, count, monkeypatch):
    """Values that are there before the sum, and memory that is free after it, would both show in the numbers.

    In CI Inductor refuses to call operators of which it knows decompositions, unless it is told to.
    """
    monkeypatch.setenv("CI", "true")
    monkeypatch.setattr(config, "force_disable_caches", True)
    piece = Piece("", function, "inductor", Backend("inductor"))
    x, w, v, h, b, row = matrices()
    w, v, b = map(torch.nn.Parameter, (w, v, b))  # whose sizes are known when a piece is compiled
    given, others = (x, w, v, h, b, row), (torch.randn(7, K), w, v, torch.randn(7, R), b, row)
    with torch.no_grad():
        found, (code,) = run_and_get_code(piece.run, *given)
        assert code.count("torch.Tensor.addmm_(") == count
        assert "= torch.Tensor.addmm_(" not in code, "a name for the result would keep its memory"
        torch.testing.assert_close(found, function(*given))
        torch.testing.assert_close(piece.run(*others), function(*others))


def test_a_pass_that_somebody_set_stays():
    own = SumsInPlace()
    with config.patch({POST_PASS: own}):
        piece = Piece("", an_update, "inductor", Backend("inductor", "reduce-overhead"))
    assert piece._options["config_patches"][POST_PASS] is own
    assert not Piece("", an_update, "aot_eager", Backend("aot_eager"))._options
