"""Residuals and fingerprints: what rounding took comes back from any guess, and no change goes unseen."""

import pytest
import torch

from lorafx.merging import residual
from lorafx.merging.residual import Residual, fingerprint, ordered

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_ordered_neighbours_differ_by_one(dtype):
    values = torch.randn(1000).to(dtype).sort().values
    assert (ordered(values).diff() >= 0).all()
    above = torch.nextafter(values.double(), torch.tensor(torch.inf).double())
    if dtype == torch.float64:
        assert (ordered(above) - ordered(values) == 1).all()
    zero = torch.tensor([-0.0, 0.0], dtype=dtype)
    assert ordered(zero).diff().item() == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_residual_restores_anything_from_anything(dtype):
    width = torch.tensor([], dtype=dtype).element_size()
    random = torch.randint(0, 256, (2, 999 * width), dtype=torch.uint8).view(dtype)
    restored = Residual.of(random[0], random[1]).restore(random[1].clone())
    assert torch.equal(restored.view(torch.uint8), random[0].view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_guess_half_the_numbers_away_is_undone_too(dtype):
    """The difference is the integer that is its own negative; +0 has a code of its own at any distance."""
    original = torch.tensor([0.0, 1.0, 0.0, 3.0], dtype=dtype)
    half = torch.iinfo(ordered(original).dtype).min
    guess = residual._flip(ordered(original) + torch.tensor([half, half, 1000, 1000], dtype=ordered(original).dtype))
    guess = guess.view(dtype)
    assert torch.equal(Residual.of(original, guess).restore(guess).view(torch.uint8), original.view(torch.uint8))


def test_zeros_are_kept_in_a_byte_however_far_the_guess_is():
    kept = Residual.of(torch.zeros(1000), torch.ones(1000))
    assert kept.nbytes == 1000 // 8 + 1000 and not kept.restore(torch.ones(1000)).any()


def test_fingerprints_tell_single_bits_and_places_apart():
    tensor = torch.randn(50, 40)
    prints = {fingerprint(tensor), fingerprint(tensor.flip(0)), fingerprint(tensor.t())}
    for place in ((0, 0), (49, 39), (7, 3)):
        other = tensor.clone()
        other.view(torch.int32)[place] ^= 1
        prints.add(fingerprint(other))
    assert len(prints) == 6 and fingerprint(tensor.clone()) == fingerprint(tensor)


def test_fingerprints_tell_places_apart_however_far(monkeypatch):
    tensor = torch.randn(40)
    monkeypatch.setattr(residual, "_CHUNK", 8)
    assert fingerprint(tensor) != fingerprint(tensor.roll(8))
