"""float8: rounding to it, products of it, and what a GPU's product is given."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorafx.ops import float8
from lorafx.ops.float8_lora_linears import float8_lora_linears
from lorafx.torch_private.tracing import FakeTensorMode

E4M3 = torch.float8_e4m3fn


def tensor(*sizes, dtype=torch.float64):
    return torch.randn(*sizes, dtype=dtype)


def test_a_weights_numbers_are_off_by_a_sixteenth_of_themselves_at_most():
    torch.manual_seed(0)
    weight = tensor(6, 40) * torch.logspace(-6, 6, 6, dtype=torch.float64)[:, None]
    q, scale = float8.packed(weight)
    assert (q.dtype, q.shape, scale.dtype, scale.shape) == (E4M3, (6, 40), torch.float32, (6,))
    dense = float8.from_float8(q, scale, torch.float64)
    smallest = scale[:, None].double() * 2**-10  # half of the smallest number above 0
    assert ((dense - weight).abs() <= torch.maximum(weight.abs() / 16, smallest)).all()


def test_a_weights_scales_are_the_least_powers_of_two_so_that_dense_weights_are_exact():
    weight = torch.cat([tensor(4, 24), torch.tensor([[448.0] * 24, [224.0] * 24, [225.0] * 24, [0.0] * 24])])
    q, scale = float8.packed(weight)
    mantissa, _ = torch.frexp(scale)
    assert (mantissa == 0.5).all() and scale[4:7].tolist() == [1.0, 0.5, 1.0]
    largest = q.double().abs().amax(1)[:7]
    assert (largest <= 448).all() and (largest >= 224).all() and not q[7].double().any()
    wide = float8.from_float8(q, scale, torch.float64)
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(float8.from_float8(q, scale, dtype).double(), wide)
    assert torch.equal(float8.from_float8(*float8.packed(wide), torch.float64), wide), "packing again changes nothing"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_rows_are_rounded_each_by_its_own_scale(dtype):
    x = tensor(5, 40, dtype=dtype) * torch.tensor([[1e-20], [1e-3], [1.0], [1e9], [0.0]], dtype=dtype)
    q, scale = float8.quantised(x)
    assert (q.dtype, scale.dtype, scale.shape) == (E4M3, torch.float32, (5, 1)) and scale.isfinite().all()
    assert q.double().abs().amax(1).tolist() == [448.0] * 4 + [0.0]
    off = (q.double() * scale - x.double()).abs()
    assert (off <= torch.maximum(x.double().abs() / 16, scale.double() * 2**-10) * (1 + 1e-6)).all()


def test_what_is_not_finite_stays_in_its_row():
    x = torch.ones(3, 16)
    x[1, 2], x[2, 3] = torch.nan, torch.inf
    y = float8.product(*float8.quantised(x), *float8.packed(torch.ones(4, 16)), torch.float32)
    assert y.isfinite().all(1).tolist() == [True, False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_product_is_that_of_what_the_factors_stand_for(dtype):
    (p, s), (q, t) = float8.quantised(tensor(5, 48)), float8.packed(tensor(7, 48))
    left, right = p.double() * s, q.double() * t[:, None]
    found, expected = float8.product(p, s, q, t, dtype), left @ right.t()
    assert found.dtype == dtype
    sums = torch.finfo(torch.promote_types(dtype, torch.float32)).eps * (48 + 2) * (left.abs() @ right.abs().t())
    assert ((found.double() - expected).abs() <= sums + torch.finfo(dtype).eps * expected.abs()).all()


def test_torchs_own_product_gives_the_same(monkeypatch):
    """The operator that a GPU has is there on CPUs too, slowly."""
    (p, s), (q, t) = float8.quantised(tensor(5, 48)), float8.packed(tensor(32, 48))
    expected = float8.product(p, s, q, t, torch.bfloat16)
    monkeypatch.setattr(float8, "multiplies", lambda device: True)
    try:
        found = float8.product(p, s, q, t, torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"not on this CPU: {error}")
    torch.testing.assert_close(found, expected, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-5)


def test_gradients_go_through_several_weights_in_one_product():
    weights, scales = zip(*[float8.packed(tensor(n, 24)) for n in (32, 16)])
    dys = [tensor(5, 32), 100 * tensor(5, 16)]
    scaled = torch.cat([dy * scale for dy, scale in zip(dys, scales)], 1)
    q, shared = float8.quantised(scaled)
    expected = (q.double() * shared) @ torch.cat([weight.double() for weight in weights])
    torch.testing.assert_close(float8.through(dys, weights, scales), expected, rtol=1e-12, atol=1e-12)


class Products(TorchDispatchMode):
    """Notes what the GPU's product is given and gives."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        found = operator(*args, **(kwargs or {}))
        if operator is torch.ops.aten._scaled_mm.default:
            self.calls.append(([(t.shape, t.stride(), t.dtype) for t in args[:4]], found.shape, found.dtype))
        return found


@pytest.fixture
def a_gpu(monkeypatch):
    """A CUDA device that multiplies float8, of which only shapes are asked; torch checks what a product is given."""
    monkeypatch.setattr(float8, "capability", lambda device: (9, 0))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), Products() as products, torch.device("cuda"):
        yield products


def weights_of(k, *outputs):
    return [torch.empty(n, k, dtype=E4M3) for n in outputs], [torch.empty(n) for n in outputs]


def test_a_gpus_products_get_rows_that_lie_in_one_piece(a_gpu):
    x, (weights, scales) = torch.empty(2, 5, 48, dtype=torch.bfloat16), weights_of(48, 32, 80)
    lora_As, lora_Bs = [x.new_empty(4, 48)] * 2, [x.new_empty(32, 4), x.new_empty(80, 4)]
    outputs = float8_lora_linears(x, weights, scales, [None, x.new_empty(80)], None, lora_As, lora_Bs, [1.0, 2.0])
    assert [(y.shape, y.dtype) for y in outputs] == [((2, 5, 32), x.dtype), ((2, 5, 80), x.dtype)]
    rounded = ((10, 48), (48, 1), E4M3), ((10, 1), (1, 1), torch.float32)
    for call, n in zip(a_gpu.calls, (32, 80), strict=True):
        left, right, scale, columns = call[0]
        assert (left, scale) == rounded and call[1:] == ((10, n), x.dtype)
        assert right == ((48, n), (1, 48), E4M3) and (columns[0], columns[2]) == ((1, n), torch.float32)


def test_a_gpus_gradient_is_a_product_with_the_transposed_weights(a_gpu):
    weights, scales = weights_of(48, 32, 80)
    dx = float8.through([torch.empty(10, n, dtype=torch.bfloat16) for n in (32, 80)], weights, scales)
    assert (dx.shape, dx.dtype) == ((10, 48), torch.bfloat16)
    ((left, right, scale, columns), *_) = a_gpu.calls[0]
    assert left == ((10, 112), (112, 1), E4M3) and scale == ((10, 1), (1, 1), torch.float32)
    assert right == ((112, 48), (1, 112), E4M3) and (columns[0], columns[2]) == ((1, 48), torch.float32)


@pytest.mark.parametrize(("dtype", "n"), [(torch.float32, 32), (torch.float16, 32), (torch.bfloat16, 40)], ids=str)
def test_what_a_gpu_does_not_multiply_goes_another_way(a_gpu, dtype, n):
    (weight,), (scale,) = weights_of(48, n)
    y = torch.ops.lorafx.float8_linear(torch.empty(5, 48, dtype=dtype), weight, scale, None)
    assert (y.shape, y.dtype, y.device.type) == ((5, n), dtype, "cuda") and a_gpu.calls == []
