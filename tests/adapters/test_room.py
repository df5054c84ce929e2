"""Room: a small tensor in a large one, and what a layer computes with either."""

import pytest
import torch
from torch.nn import functional as F

from lorafx.adapters.room import fill, has_room, held


@pytest.mark.parametrize("groups", [1, 2])
def test_what_is_held_comes_back_and_computes_the_same(groups):
    torch.manual_seed(0)
    a, b = torch.randn(2, 4, 3).double(), torch.randn(6, 2 // groups, 1).double()
    large_a, large_b = torch.randn(8, 4, 3).double(), torch.randn(6, 8 // groups, 1).double()
    for room, value in ((large_a, a), (large_b, b)):
        fill(room, value, groups)
        assert torch.equal(held(room, tuple(value.shape), groups), value)
        assert room.count_nonzero() == value.count_nonzero()
    x = torch.randn(2, 4, 7).double()
    found, expected = (F.conv1d(F.conv1d(x, p), q, groups=groups) for p, q in ((large_a, large_b), (a, b)))
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_a_tensor_of_its_size_is_the_tensor_itself():
    room = torch.zeros(3, 5)
    assert held(room, (3, 5), 1) is room
    held(room, (2, 5), 1)[0, 0] = 1  # a view
    assert room[0, 0] == 1


def test_what_has_room():
    assert has_room((4, 3), (2, 3)) and not has_room((4, 3), (4, 5)) and not has_room((4, 3), (4,))
