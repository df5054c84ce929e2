"""row_norms against the norm of the matrix with the update in it."""

import pytest
import torch

from lorafx.ops.row_norms import reference, row_norms


def factors(dtype, out=7, inputs=11, r=3):
    return tuple(torch.randn(shape, dtype=torch.float64).to(dtype) for shape in ((out, inputs), (r, inputs), (out, r)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_it_is_the_norm_of_each_row(dtype):
    weight, a, b = factors(dtype)
    found, exact = row_norms(weight, a, b), reference(weight.double(), a.double(), b.double())
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    # W Aᵀ is rounded to dtype; 11 products are added up in float32 at least.
    torch.testing.assert_close(found.double(), exact, rtol=8 * torch.finfo(dtype).eps, atol=0)


def test_without_an_update_it_is_the_norm_to_the_bit():
    weight, a, b = factors(torch.bfloat16)
    assert torch.equal(row_norms(weight, a, b.zero_()), torch.linalg.vector_norm(weight.float(), dim=1))


def test_rows_of_zeros_have_norm_zero_and_their_update_its_own():
    weight, a, b = factors(torch.float64)
    weight[2], weight[4], b[4] = 0, 0, 0
    found = row_norms(weight, a, b)
    assert found[4] == 0
    torch.testing.assert_close(found[2], (b[2] @ a).norm())


def test_a_row_that_the_update_cancels_is_no_root_of_a_negative_number():
    weight, a, b = factors(torch.float32)
    found = row_norms(-(b @ a), a, b)
    assert found.isfinite().all()
    assert (found < 1e-3 * weight.norm()).all()


def test_autocast_rounds_nothing_and_nothing_has_a_gradient():
    weight, a, b = (each.requires_grad_() for each in factors(torch.float32))
    plain = row_norms(weight, a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(row_norms(weight, a, b), plain)
    assert not plain.requires_grad
