"""lora_by_row against the equation, row by row in float64: any ranks, adapters and orders."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lorafx
from lorafx.ops import is_of_row, lora_by_row

INPUTS, OUTPUTS = 5, 7


def made(ranks, rows, tokens, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(len(rows), tokens, width, generator=rng).to(dtype) for width in (INPUTS, OUTPUTS))
    lora_As = [torch.randn(r, INPUTS, generator=rng).to(dtype) for r in ranks]
    lora_Bs = [torch.randn(OUTPUTS, r, generator=rng).to(dtype) for r in ranks]
    return y, x, torch.tensor(rows), lora_As, lora_Bs


def by_hand(y, x, rows, numbers, lora_As, lora_Bs, scalings):
    """In float64, a row at a time."""
    result = []
    for row, number in enumerate(rows.tolist()):
        own = y[row].double()
        if number in numbers:
            k = numbers.index(number)
            own = own + scalings[k] * (x[row].double() @ lora_As[k].double().t()) @ lora_Bs[k].double().t()
        result.append(own)
    return torch.stack(result)


@st.composite
def cases(draw):
    count = draw(st.integers(1, 4))
    ranks = draw(st.lists(st.integers(1, 6), min_size=count, max_size=count))
    numbers = draw(st.lists(st.integers(1, 6), min_size=count, max_size=count, unique=True))
    scalings = draw(st.lists(st.sampled_from([0.5, 2.0, -1.0]), min_size=count, max_size=count))
    rows = draw(st.lists(st.integers(0, 7), min_size=1, max_size=6))
    return ranks, numbers, scalings, rows, draw(st.integers(1, 4)), draw(st.booleans())


@settings(max_examples=60, deadline=None)
@given(cases())
def test_any_ranks_rows_and_numbers(case):
    ranks, numbers, scalings, rows, tokens, flat = case
    y, x, rows, lora_As, lora_Bs = made(ranks, rows, tokens)
    trained = [tensor.requires_grad_() for tensor in (x, *lora_As, *lora_Bs)]
    given_y, given_x = (tensor.flatten(0, 1) if flat else tensor for tensor in (y, x))
    found = lora_by_row(given_y, given_x, rows, numbers, lora_As, lora_Bs, scalings, [0.0] * len(ranks))
    assert found.shape == given_y.shape
    expected = by_hand(y, x, rows, numbers, lora_As, lora_Bs, scalings)
    limit = 32 * torch.finfo(torch.float32).eps * max(1.0, float(expected.abs().max().detach()))
    torch.testing.assert_close(found.view_as(y).double(), expected, rtol=0, atol=limit)
    if not set(numbers) & set(rows.tolist()):
        return
    ours = torch.autograd.grad(found.square().sum(), trained, allow_unused=True)
    theirs = torch.autograd.grad(expected.square().sum(), trained, allow_unused=True)
    largest = max(float(gradient.abs().max()) for gradient in theirs if gradient is not None)
    for own, gradient in zip(ours, theirs):  # of an adapter that no row has autograd says nothing, and we say zero
        gradient = torch.zeros_like(own) if gradient is None else gradient
        torch.testing.assert_close(own, gradient, rtol=0, atol=128 * torch.finfo(torch.float32).eps * largest)


def test_second_derivatives():
    y, x, rows, lora_As, lora_Bs = made([2, 3], [1, 0, 2], 2, torch.float64)
    tensors = [tensor.requires_grad_() for tensor in (x, *lora_As, *lora_Bs)]

    def run(x, a, b, c, d):
        return lora_by_row(y, x, rows, [1, 2], [a, b], [c, d], [0.5, 3.0], [0.0, 0.0])

    assert torch.autograd.gradgradcheck(run, tensors)


def test_an_update_in_another_dtype_keeps_that_of_y():
    y, x, rows, lora_As, lora_Bs = made([2], [1, 0], 3)
    found = lora_by_row(y.bfloat16(), x, rows, [1], lora_As, lora_Bs, [2.0], [0.0])
    assert found.dtype == torch.bfloat16
    expected = by_hand(y.bfloat16(), x, rows, [1], lora_As, lora_Bs, [2.0])
    torch.testing.assert_close(found.double(), expected, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=0.02)


def test_rows_are_told_in_tokens_and_in_images():
    rows = torch.tensor([2, 0, 2])
    assert is_of_row(rows, torch.empty(3, 4, 5, 5), 2).flatten().tolist() == [True, False, True]
    assert is_of_row(rows, torch.empty(6, 4), 2).flatten().tolist() == [True, True, False, False, True, True]
    assert torch.ops.lorafx.is_of_row.default(rows, torch.empty(3), 0).tolist() == [False, True, False]


def test_tokens_of_a_row_may_have_adapters_of_their_own():
    tokens, like = torch.tensor([[0, 2, 2], [0, 0, 2], [1, 1, 1]]), torch.randn(3, 3, 4)
    expected = torch.tensor([[False, True, True], [False, False, True], [False] * 3])
    assert torch.equal(is_of_row(tokens, like, 2), expected.unsqueeze(-1))
    assert torch.equal(is_of_row(tokens, like.view(9, 4), 2), expected.view(9, 1))
    assert torch.equal(is_of_row(tokens, like[:, -1:], 2), expected[:, -1:, None]), "fewer tokens are the last"
    a, b = torch.randn(5, 4), torch.randn(6, 5)
    for x in (like, like.view(9, 4), like.unsqueeze(2).expand(-1, -1, 2, -1)):
        y = torch.randn(*x.shape[:-1], 6)
        found = torch.ops.lorafx.lora_by_row.default(y, x, tokens, [2], [a], [b], [0.5], [0.0])
        acts = expected.view(*x.shape[: x.ndim - 1 if x.ndim < 4 else 2], *([1] if x.ndim < 4 else [1, 1]))
        torch.testing.assert_close(found, torch.where(acts, y + 0.5 * x @ a.t() @ b.t(), y))
    with pytest.raises(ValueError, match="more tokens than"):
        is_of_row(tokens, torch.randn(3, 4, 4), 2)


@pytest.mark.parametrize("shared", [True, False])
def test_dropout_divides_what_it_keeps(shared):
    assert lorafx
    x, y = torch.ones(3, 1, 4000), torch.zeros(3, 1, 1)
    lora_As, lora_Bs = [torch.ones(1, 4000)] * 2, [torch.ones(1, 1)] * 2
    dropouts = [0.5, 0.5 if shared else 0.75]
    kept = lora_by_row(y, x, torch.tensor([1, 2, 0]), [1, 2], lora_As, lora_Bs, [1.0, 1.0], dropouts).flatten() / 4000
    assert kept[2] == 0
    for row, p in enumerate(dropouts):
        assert 0 < abs(float(kept[row]) - 1) < 6 * (p / (1 - p) / 4000) ** 0.5
