"""Residuals: what rounding took comes back from any guess."""

import pytest
import torch

from lorafx.merging import residual
from lorafx.merging.residual import Residual

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INTEGERS = {torch.float64: torch.int64, torch.float32: torch.int32}


@pytest.fixture(params=["numpy", "torch"], autouse=True)
def way(request, monkeypatch):
    """The lines as they run on a CPU and elsewhere."""
    if request.param == "torch":
        monkeypatch.setattr(residual, "_array", lambda tensor: tensor)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 999])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_residual_restores_anything_from_anything(dtype, count):
    width = torch.tensor([], dtype=dtype).element_size()
    random = torch.randint(0, 256, (2, count * width), dtype=torch.uint8).view(dtype)
    restored = Residual.of(random[0], random[1].clone()).restore(random[1].clone())
    assert torch.equal(restored.view(torch.uint8), random[0].view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distance", [-2, -1, 0, 1, 2, 3, 257, "half"])
def test_each_distance_is_undone(dtype, distance):
    """Near ones in two bits each, others besides; half the numbers away is the integer that is its own negative."""
    integer = INTEGERS.get(dtype, torch.int16)
    original = torch.linspace(-3, 3, 40, dtype=torch.float64).to(dtype).reshape(8, 5)
    steps = torch.iinfo(integer).min if distance == "half" else distance
    guess = (original.view(integer) + steps).view(dtype)
    kept = Residual.of(original, guess.clone())
    assert torch.equal(kept.restore(guess.clone()).view(torch.uint8), original.view(torch.uint8))
    near = distance in (-1, 0, 1, 2)
    assert kept.nbytes == 40 // 4 + (0 if near else 40 * (original.element_size() + 4))  # with places of four bytes


def test_layouts_do_not_matter():
    original = torch.randn(6, 10).t()
    guess = torch.randn(10, 6)
    restored = Residual.of(original, guess.clone()).restore(guess.clone())
    assert torch.equal(restored, original) and restored.shape == (10, 6)
