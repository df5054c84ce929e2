"""Products of low rank: the same bits in whatever order they are added, and as near as float32 is."""

import math
from fractions import Fraction

import pytest
import torch

from lorafx.adapters.low_rank import LowRank


def factors(rank: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries of very different sizes, by row, by column and among themselves."""
    left = torch.randn(37, rank) * torch.logspace(-20, 20, 37)[:, None]
    right = torch.randn(rank, 53) * torch.logspace(-15, 10, 53)
    return (left * torch.rand(37, rank) ** 4).to(dtype), right.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 2, 3, 16, 32, 33, 300])
def test_no_order_of_the_terms_matters(rank, dtype):
    left, right = factors(rank, dtype)
    expected = LowRank(left, right, (37, 53)).dense()
    for _ in range(5):
        order = torch.randperm(rank)
        assert torch.equal(LowRank(left[:, order], right[order], (37, 53)).dense(), expected)
    sums = []
    for pair in LowRank(left, right, (37, 53))._factors:
        one_by_one = torch.zeros(37, 53, dtype=torch.float64)
        for column, row in zip(pair[0].t(), pair[1]):
            one_by_one += torch.outer(column, row)
        sums.append(one_by_one)
    assert torch.equal(sum(sums), expected) and len(sums) == (6 if dtype == torch.float64 else 1)


@pytest.mark.parametrize("rank", [1, 8, 32, 300])
def test_in_float64_it_is_as_near_as_six_sums_of_exact_numbers(rank):
    """Each is off by half a unit of its last bit; what is not added is a few 2^-3bits of the largest products."""
    left, right = factors(rank, torch.float64)
    left, right = left[::9], right[:, ::13]
    found = LowRank(left, right, (5, 5)).dense()
    pairs = [[zip(map(Fraction, row), map(Fraction, column)) for column in right.t().tolist()] for row in left.tolist()]
    exact = [[sum(a * b for a, b in terms) for terms in row] for row in pairs]
    error = [[float(abs(Fraction(f) - e)) for f, e in zip(*rows)] for rows in zip(found.tolist(), exact)]
    bits = (53 - math.ceil(math.log2(rank))) // 2
    largest = left.abs().amax(1, keepdim=True) * right.abs().amax(0)
    assert (
        torch.tensor(error) <= 6 * 2.0**-53 * (left.abs() @ right.abs()) + 3 * rank * 2.0 ** (-3 * bits) * largest
    ).all()


@pytest.mark.parametrize("rank", [1, 8, 32, 300])
def test_it_is_as_near_as_a_product_in_float32(rank):
    """Each factor is off by half a unit of its last bit, 2^-bits of the largest in its row or column."""
    left, right = factors(rank)
    bits = (53 - math.ceil(math.log2(rank))) // 2
    largest = left.double().abs().amax(1, keepdim=True) * right.double().abs().amax(0)
    error = (LowRank(left, right, (37, 53)).dense() - left.double() @ right.double()).abs()
    assert (error <= rank * 2 * 2.0**-bits * largest).all() and (rank < 300 or error.any())


def test_rows_are_rows_of_the_whole_and_numbers_multiply_it():
    left, right = factors(4)
    change = 2 * LowRank(left, right, (37, 53, 1)) * 0.5
    assert change.dense().shape == (37, 53, 1)
    stack = LowRank.stacked([change, 3.0 * change])
    for number, each in enumerate((change, 3.0 * change)):
        assert torch.equal(stack.rows(slice(30, 40))[number], each.dense()[30:])
        assert torch.equal(LowRank.stacked([each]).rows(...)[0], each.dense())
    assert torch.equal(change.dense(), LowRank(left, right, (37, 53, 1)).dense())


def test_zeros_and_infinities():
    left, right = factors(3)
    left[0], left[1, 0], right[:, 2] = 0, math.inf, 0
    found = LowRank(left, right, (37, 53)).dense()
    assert not found[0].any() and found[2:, 2].eq(0).all() and not found[1].isfinite().any()
    assert found[2:].isfinite().all()
    left, right = factors(3, torch.float64)
    left[0], left[1, 0], right[:, 2] = 0, math.inf, 0
    found = LowRank(left, right, (37, 53)).dense()
    assert not found[0].any() and not found[1].isfinite().any() and found[2:].isfinite().all()
