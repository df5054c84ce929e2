"""match: what a pattern is found at, and why it is not found where it is not."""

import torch
from modules import Gates
from torch import nn
from torch.fx import Graph

import lorafx
from lorafx.graph import Match, NoMatch, match

aten = torch.ops.aten


def graph():
    return lorafx.trace(Gates(), torch.randn(5, 4), torch.randn(5, 4))


def silu(x):
    return aten.mul.Tensor(aten.sigmoid.default(x), x)


def products(gm):
    return gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor)


def test_a_name_that_occurs_twice_stands_for_one_value():
    first, second = products(graph())
    assert isinstance(match(silu, first), Match)
    refused = match(silu, second)
    assert isinstance(refused, NoMatch) and not refused
    assert "`x` would stand for both" in refused.reason
    assert "modules.py" in str(refused) and "torch.sigmoid(y) * x" in str(refused)


def test_an_operator_or_a_number_that_differs_is_named():
    def relu(x):
        return aten.relu.default(x)

    def plus_alpha(x, y):
        return aten.add.Tensor(x, y, alpha=2)

    gm = graph()
    assert "expected aten.relu.default, found aten.mul.Tensor" in match(relu, products(gm)[0]).reason
    added = gm.graph.find_nodes(op="call_function", target=aten.add.Tensor)[0]
    assert "expected 2, found 1" in match(plus_alpha, added).reason


def test_a_value_used_outside_is_not_taken_away():
    class Reused(nn.Module):
        def forward(self, x):
            gate = torch.sigmoid(x)
            return gate * x, gate

    gm = lorafx.trace(Reused(), torch.randn(5, 4))
    assert match(silu, products(gm)[0]).reason == "its result is used outside the pattern"


def test_what_a_pattern_covers_is_not_also_given_to_it():
    class Squared(nn.Module):
        def forward(self, x):
            gate = torch.sigmoid(x)
            return gate * gate

    def gated(x, y):
        return aten.mul.Tensor(aten.sigmoid.default(x), y)

    refused = match(gated, products(lorafx.trace(Squared(), torch.randn(5, 4)))[0])
    assert isinstance(refused, NoMatch) and "one of its inputs" in refused.reason


def test_arguments_left_at_their_default_are_bound():
    def linear(x, weight, bias):
        return aten.linear.default(x, weight, bias)

    gm = lorafx.trace(nn.Linear(4, 3, bias=False), torch.randn(5, 4))
    found = match(linear, gm.graph.find_nodes(op="call_function", target=aten.linear.default)[0])
    assert isinstance(found, Match) and found.bindings["bias"] is None


def test_true_is_not_one():
    def drop(x):
        return aten.dropout.default(x, 0, True)

    graph = Graph()
    one = graph.call_function(aten.dropout.default, (graph.placeholder("x"), 0, 1))
    assert not match(drop, one)
    one.args = (*one.args[:2], True)
    assert match(drop, one)
