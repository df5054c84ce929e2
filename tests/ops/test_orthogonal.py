"""Factors of orthogonal matrices against the products and inverses that they stand for."""

import pytest
import torch

from lorafx.ops.orthogonal import cayley, reflections, skew_symmetric


def skew(q, size):
    upper = torch.zeros(len(q), size, size, dtype=q.dtype)
    rows, columns = torch.triu_indices(size, size, 1)
    upper[:, rows, columns] = q
    return upper - upper.mT


def test_it_solves_for_an_orthogonal_matrix():
    q, identity = torch.randn(3, 10, dtype=torch.float64), torch.eye(5, dtype=torch.float64)
    turn = cayley(skew_symmetric(q, 5), 0) + identity
    torch.testing.assert_close(turn @ turn.mT, identity.expand(3, 5, 5), rtol=1e-12, atol=1e-12)
    full = skew(q, 5)
    torch.testing.assert_close(turn, (identity - full) @ torch.linalg.inv(identity + full), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("terms", "powers"), [(1, []), (2, [2]), (4, [2, 2, 1]), (5, [2, 2, 2, 1]), (3, [2, 2, 1])])
def test_the_series_is_pefts(terms, powers):
    q = torch.randn(2, 6, dtype=torch.float64) / 10
    full = skew(q, 4)
    expected = sum((c * torch.linalg.matrix_power(full, n) for n, c in enumerate(powers, 1)), torch.zeros_like(full))
    torch.testing.assert_close(cayley(skew_symmetric(q, 4), terms), expected, rtol=1e-12, atol=1e-12)


def product(u):
    total = torch.eye(len(u), dtype=u.dtype)
    for column in (u / u.norm(dim=0)).T:
        total = total - 2 * total @ column[:, None] @ column[None]
    return total


@pytest.mark.parametrize("r", [1, 2, 5])
def test_reflections_one_after_another(r):
    u = torch.randn(7, r, dtype=torch.float64, requires_grad=True)
    first, second = reflections(u, False)
    found = torch.eye(7, dtype=torch.float64) - second @ first.T
    torch.testing.assert_close(found, product(u), rtol=1e-12, atol=1e-12)
    weights = torch.randn(7, 7, dtype=torch.float64)
    (ours,) = torch.autograd.grad((found * weights).sum(), u)
    (theirs,) = torch.autograd.grad((product(u) * weights).sum(), u)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_of_half_precision_are_computed_with_in_float32(dtype):
    skew, u = skew_symmetric(torch.randn(3, 10), 5).to(dtype), torch.randn(7, 3).to(dtype)
    assert torch.equal(cayley(skew, 0), cayley(skew.float(), 0)) and cayley(skew, 5).dtype is torch.float32
    for found, expected in zip(reflections(u, False), reflections(u.float(), False)):
        assert torch.equal(found, expected)


def test_equal_pairs_cancel():
    first, second = reflections(torch.randn(7, 2).repeat_interleave(2, dim=1), False)
    assert (second @ first.T).abs().max() < 16 * torch.finfo(torch.float32).eps


def test_reflections_by_a_span():
    u = torch.randn(7, 3, dtype=torch.float64)
    first, second = reflections(u, True)
    found = torch.eye(7, dtype=torch.float64) - second @ first.T
    torch.testing.assert_close(found, product(torch.linalg.qr(u).Q), rtol=1e-12, atol=1e-12)
