"""AtSizes: what a graph computes of sizes alone, at chosen sizes; what depends on data is refused."""

import pytest
import torch
from torch import nn

import lorafx
from lorafx.graph.masks.positions import integers
from lorafx.graph.masks.sizes import ONES, AtSizes, DependsOnData, apart, is_written_to, symbols_of, together
from lorafx.passes import Canonicalize
from lorafx.pipeline import Pipeline


class Masked(nn.Module):
    """(batch, length, 4), times what `make` makes of it."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        mask = self.make(x)
        return x * 2, mask


def mask_of(make):
    """A graph, and the node of its mask."""
    gm = lorafx.trace(Masked(make), torch.randn(3, 7, 4))
    Pipeline(Canonicalize()).run(gm)
    return gm, gm.graph.output_node().all_input_nodes[1]


def at_five(gm, mask):
    """What the mask is where its sizes are 5 and more, in some order; and these sizes."""
    values = together(mask.meta["val"].shape, 5)
    sizes = [values(symbols_of([size])[0]) for size in mask.meta["val"].shape]
    assert sorted(sizes) == list(range(5, 5 + len(sizes)))
    return AtSizes(gm, values)(mask), sizes


def near(x, width=5):
    positions = torch.arange(x.shape[1])
    return positions[:, None] - positions[None, :] < width


@pytest.mark.parametrize("length", [2, 7, 30])
def test_a_mask_is_run_at_other_sizes(length):
    gm, mask = mask_of(near)
    ran = AtSizes(gm, apart(mask.meta["val"].shape, length))
    assert torch.equal(ran(mask), near(torch.zeros(1, length, 4)))
    assert {node.op for _, node in ran.ran()} == {"call_function"} and all(at is ran for at, _ in ran.ran())


def test_integers_are_those_that_the_mask_is_made_of():
    gm, mask = mask_of(near)
    ran = AtSizes(gm, apart(mask.meta["val"].shape, 9))
    ran(mask)
    assert 5 in integers(ran) and max(integers(ran)) == 5


def test_what_depends_on_data_is_refused():
    gm, mask = mask_of(lambda x: x[..., 0] > 0)
    with pytest.raises(DependsOnData, match="no operator on sizes"):
        at_five(gm, mask)
    gm, mask = mask_of(lambda x: torch.rand(x.shape[1]) > 0.5)
    with pytest.raises(DependsOnData):
        at_five(gm, mask)


def test_of_a_tensor_like_the_input_only_the_shape_counts():
    gm, mask = mask_of(lambda x: torch.zeros_like(x, dtype=torch.long) + 1)
    found, sizes = at_five(gm, mask)
    assert torch.equal(found, torch.ones(sizes, dtype=torch.long))


def test_an_input_that_is_known_to_be_ones_is_ones():
    gm, mask = mask_of(lambda x: x.sum(-1))
    with pytest.raises(DependsOnData):
        at_five(gm, mask)
    (x,) = gm.graph.find_nodes(op="placeholder")
    x.meta[ONES] = True
    found, sizes = at_five(gm, mask)
    assert torch.equal(found, torch.full(sizes, 2.0)), "the last size is not the mask's, so it is the smallest there is"


def test_symbols_grow_apart_or_with_those_that_had_their_size():
    class Two(nn.Module):
        def forward(self, x, y):
            return x + 1, y + 1

    gm = lorafx.trace(Two(), torch.randn(3, 5), torch.randn(5, 7))
    (first, second), (other, third) = (n.meta["val"].shape for n in gm.graph.find_nodes(op="placeholder"))
    symbol = {name: symbols_of([size])[0] for name, size in zip("abcd", (first, second, other, third))}
    assert len(symbols_of([first, second, first])) == 2
    values = together([first, second], 20)
    grown = {name: values(each) for name, each in symbol.items()}
    assert {grown["a"], grown["b"]} == {20, 21} and grown["c"] == grown["b"], "both were 5"
    assert grown["d"] == 2
    alone = apart([first, second], 20, others=4)
    assert {alone(symbol["a"]), alone(symbol["b"])} == {20, 21} and alone(symbol["d"]) == 4
    assert (symbol["c"] == symbol["b"]) == (alone(symbol["c"]) != 4)


def test_what_is_written_to_later_is_told():
    def written(x):
        mask = near(x).clone()
        view = mask[:, :1]
        view.logical_not_()
        return mask

    for make, expected in ((near, False), (written, True)):
        gm, _ = mask_of(make)
        (compared,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.lt.Scalar)
        last = next(iter(compared.users)) if expected else compared
        ran = AtSizes(gm, apart(last.meta["val"].shape, 5))
        ran(last)
        assert is_written_to(ran) is expected
