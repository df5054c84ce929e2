"""Fingerprints: no change of a tensor goes unseen, wherever and however small."""

import pytest
import torch

from lorafx.merging import fingerprint
from lorafx.merging.fingerprint import is_of, size


@pytest.fixture(params=["_hash", "_sums"], autouse=True)
def way(request, monkeypatch):
    """Both ways to make one, on this device."""
    monkeypatch.setattr(fingerprint, "fingerprint", getattr(fingerprint, request.param))
    return request.param


def seen(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return not is_of(fingerprint.fingerprint(tensor), other)


def test_single_bits_and_places_are_told_apart():
    tensor = torch.randn(50, 40)
    assert not seen(tensor, tensor.clone()) and seen(tensor, tensor.flip(0)) and seen(tensor, tensor.t())
    for place in ((0, 0), (49, 39), (7, 3)):
        for bit in (0, 8, 31):
            other = tensor.clone()
            other.view(torch.int32)[place] ^= torch.tensor(1 << bit).to(torch.int32)
            assert seen(tensor, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_changes_that_balance_are_seen(dtype):
    """Signs that flip, all or by columns, rows and columns that trade places, a shift by a whole row of 4096 bytes."""
    tensor = torch.randint(1, 100, (64, 130)).to(dtype)
    columns = tensor.clone()
    columns[:, 1::2] *= -1
    shifted = tensor.view(-1).roll(4096 // tensor.element_size())
    others = (-tensor, columns, tensor[torch.randperm(64)], tensor[:, torch.randperm(130)], shifted)
    assert all(seen(tensor, other) for other in others)


def test_they_are_small(way):
    known = fingerprint.fingerprint(torch.randn(64, 130))
    assert size(known) == (16 if way == "_hash" else 9 * 32)  # for each 4096 bytes that are begun


def test_sums_are_exact():
    """The largest bytes there are, in a row of each sign."""
    data = torch.tensor([-128, 127], dtype=torch.int8).repeat(4096).view(2, -1)
    matrix = fingerprint._matrix(torch.device("cpu")).long()
    assert torch.equal(fingerprint._sums(data).long(), data.long() @ matrix)


@pytest.mark.parametrize(
    "part", [(slice(None), slice(None, None, 2)), (slice(2), slice(0, 1)), (slice(1), slice(0, 1))]
)
def test_it_is_of_the_numbers_however_they_lie(part):
    """Also one number of a row with others between: torch takes that for contiguous, whatever its stride is."""
    tensor = torch.randn(5, 6).t()[part]
    assert not seen(tensor, tensor.clone(memory_format=torch.contiguous_format)) and seen(tensor, tensor + 1)
