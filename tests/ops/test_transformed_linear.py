"""Linear layers by Fourier transforms: what they compute, and their derivatives, are those of a weight in memory."""

import sys

import pytest
import torch

import lorafx.ops

FOURIER, CIRCULANT = (sys.modules[f"lorafx.ops.{name}"] for name in ("fourier_linear", "circulant_linear"))
PLACES = torch.tensor([[0, 6, 3, 3, 1], [0, 4, 2, 1, 2]])  # two in one row, two in one column
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def fourier(x, c):
    return lorafx.ops.fourier_linear(x, c, PLACES, 7)


def fourier_in_memory(x, c):
    return FOURIER.reference(x, c, PLACES, 7)


CASES = [
    pytest.param(fourier, fourier_in_memory, (3, 5), (5,), id="fourier"),
    pytest.param(lorafx.ops.circulant_linear, CIRCULANT.reference, (3, 6), (4, 2, 3), id="circulant"),
    pytest.param(lorafx.ops.circulant_linear, CIRCULANT.reference, (3, 8), (3, 2, 4), id="circulant, even"),
]


@pytest.mark.parametrize(("function", "reference", "of_x", "of_w"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_they_give_what_the_weight_gives(function, reference, of_x, of_w, dtype):
    x, w = torch.randn(of_x).to(dtype), torch.randn(of_w).to(dtype)
    found = function(x, w)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    near = 64 * torch.finfo(found.dtype).eps  # transforms and sums of at most 8 numbers, of about 1
    torch.testing.assert_close(found, reference(x, w), rtol=near, atol=near)


@pytest.mark.parametrize(("function", "reference", "of_x", "of_w"), CASES)
def test_their_derivatives_are_true(function, reference, of_x, of_w):
    x, w = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in (of_x, of_w))
    assert torch.autograd.gradcheck(function, (x, w))
    assert torch.autograd.gradgradcheck(function, (x, w))


def test_a_circulant_block_is_its_first_row_turned():
    weight = CIRCULANT.circulant_weight(torch.tensor([[[1.0, 2.0, 3.0]]])) * 3
    assert weight.tolist() == [[1, 2, 3], [3, 1, 2], [2, 3, 1]]


def test_a_weight_of_one_frequency_is_a_wave():
    weight = FOURIER.fourier_weight(torch.tensor([12.0]), torch.tensor([[0], [1]]), (3, 4))
    torch.testing.assert_close(weight, torch.tensor([[1.0, 0.0, -1.0, 0.0]]).expand(3, 4))
