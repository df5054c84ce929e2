"""Combining tensors: what each formula makes of a few numbers, and what is refused."""

import pytest
import torch

from lorafx.adapters.combining import Combination
from lorafx.errors import ConfigError

A, B = torch.tensor([1.0, -2.0, 3.0, 0.0]), torch.tensor([-4.0, -1.0, 0.5, 2.0])


def made(name, tensors=(A, B), weights=(1.0, 10.0), seed=0, **options):
    return Combination(name, **options).combined(tensors, weights, torch.Generator().manual_seed(seed)).tolist()


def test_by_hand():
    assert made("linear") == [-39.0, -12.0, 8.0, 20.0]
    assert made("magnitude_prune", density=0.5) == [-40.0, -2.0, 3.0, 20.0]
    # signs of the sums -3, -3, 3.5, 2: where only one agrees it is alone, where both do it is the mean
    assert made("ties", density=1.0) == [-40.0, -6.0, 4.0, 20.0]
    # signs of the sums of signs 0, -2, 2, 1
    assert made("ties", density=1.0, majority_sign_method="frequency") == [1.0, -6.0, 4.0, 20.0]
    assert made("ties", density=0.5) == [-40.0, -2.0, 3.0, 20.0]


def test_what_dare_drops_is_drawn_and_the_rest_is_as_large_on_average():
    ones = torch.ones(20_000)
    found = Combination("dare_linear", density=0.25).combined([ones], [3.0], torch.Generator().manual_seed(0))
    assert sorted({*found.tolist()}) == [0.0, 12.0]
    deviation = 12 * (0.25 * 0.75 / len(ones)) ** 0.5
    assert abs(found.mean() - 3.0) < 5 * deviation
    assert made("dare_ties", seed=1, density=0.5) == made("dare_ties", seed=1, density=0.5)
    assert made("dare_ties", density=1.0) == made("ties", density=1.0)


def test_factors_of_a_lower_rank_are_the_nearest():
    matrix = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = Combination(svd_full_matrices=False).factors(matrix, 2)
    rest = torch.linalg.svdvals(matrix)[2:].square().sum().sqrt()
    torch.testing.assert_close((matrix - b @ a).norm(), rest, rtol=1e-12, atol=0)
    assert [tuple(f.shape) for f in Combination().factors(matrix, 9)] == [(5, 7), (5, 5)]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"combination_type": "sum"}, "combination_type"),
        ({"combination_type": "ties"}, "density"),
        ({"combination_type": "dare_linear", "density": 0}, "density"),
        ({"combination_type": "ties_svd", "density": 1.5}, "density"),
        ({"svd_rank": 0}, "svd_rank"),
        ({"svd_rank": True}, "svd_rank"),
        ({"svd_clamp": 2.0}, "svd_clamp"),
        ({"majority_sign_method": "most"}, "majority_sign_method"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(options, named):
    with pytest.raises(ConfigError, match=f"`{named}` must be"):
        Combination(**options)


def test_a_driver_of_cuda_s_is_refused_on_a_cpu():
    with pytest.raises(ConfigError, match="svd_driver='gesvd'"):
        Combination(svd_driver="gesvd").factors(torch.eye(3), 1)
