"""Every way of `products.py` computes the equation, for one linear and for several of different widths."""

import products
import pytest
import torch


@pytest.mark.parametrize("way", sorted(set(products.WAYS) - {"base", "tuned"}))
@pytest.mark.parametrize("outputs", [(40,), (40, 24, 56)])
def test_a_way_computes_the_equation(way, outputs):
    of = products.group(24, 48, outputs, "cpu", torch.float32)
    with torch.no_grad():
        products.check(way, of, products.WAYS[way](of))


def test_a_way_that_is_off_is_noticed():
    of = products.group(24, 48, (40, 24), "cpu", torch.float32)
    forward, backward = products.stacked(of)
    with pytest.raises(AssertionError, match="wrong is off by"):
        products.check("wrong", of, (lambda: [1.0001 * y for y in forward()], backward))


def test_a_layer_is_the_sum_of_its_linears_by_round():
    taken = {("o", "base"): [(1.0, 2.0), (3.0, 4.0)], ("down", "base"): [(10.0, 20.0), (30.0, 40.0)]}
    assert products.with_layer(taken, ["base"])["layer", "base"] == [(11.0, 22.0), (33.0, 44.0)]
