"""Rules: what matches, what does not and why, and what is left behind."""

import torch
from modules import Gates
from torch import nn

import lorafx
from lorafx.graph import Match, NoMatch, Provenance, Rule, made_by

aten = torch.ops.aten


def graph():
    return lorafx.trace(Gates(), torch.randn(5, 4), torch.randn(5, 4))


def silu(x):
    return aten.mul.Tensor(aten.sigmoid.default(x), x)


def fused(x):
    return aten.silu.default(x)


def products(gm):
    return gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor)


def test_a_rule_rewrites_and_its_reverse_restores():
    gm, x, y = graph(), torch.randn(5, 4), torch.randn(5, 4)
    expected, before = gm(x, y), [node.target for node in gm.graph.nodes]
    rule = Rule(silu, fused)
    assert rule.apply_everywhere(gm, "test") == 1
    gm.recompile()
    made = [node for node in gm.graph.nodes if made_by(node)]
    assert [node.target for node in made] == [aten.silu.default]
    assert made_by(made[0]) == Provenance("test")
    assert made[0].meta["val"].shape == products(gm)[0].meta["val"].shape
    assert "torch.sigmoid(x) * x" in made[0].meta["stack_trace"]
    torch.testing.assert_close(gm(x, y), expected)
    assert rule.reversed().apply_everywhere(gm, "test") == 1
    assert [node.target for node in gm.graph.nodes] == before


def test_a_check_refuses_with_its_reason():
    rule = Rule(silu, fused, check=lambda found: "not today")
    gm = graph()
    refused = rule.find(products(gm)[0])
    assert isinstance(refused, NoMatch) and refused.reason == "not today"
    assert rule.apply_everywhere(gm, "test") == 0


def test_what_is_written_to_between_a_patterns_lines_keeps_it():
    class Written(nn.Module):
        def forward(self, x, y):
            x, gate = x * 1, torch.sigmoid(x)
            x.add_(y)
            return gate * y

    def gated(x, y):
        return aten.mul.Tensor(aten.sigmoid.default(x), y)

    def one(x, y):
        return aten.special_xlogy.default(x, y)

    gm = lorafx.trace(Written(), torch.randn(5, 4), torch.randn(5, 4))
    refused = Rule(gated, one).find(products(gm)[-1])
    assert isinstance(refused, NoMatch) and "written to" in refused.reason
    gm.graph.erase_node(next(node for node in gm.graph.nodes if node.target is aten.add_.Tensor))
    assert isinstance(Rule(gated, one).find(products(gm)[-1]), Match)


def test_what_a_patterns_own_lines_write_is_no_hindrance():
    class Rectified(nn.Module):
        def forward(self, x, y):
            return torch.relu_(x * 1) * y

    def written(x, y):
        return aten.mul.Tensor(aten.relu_.default(x), y)

    gm = lorafx.trace(Rectified(), torch.randn(5, 4), torch.randn(5, 4))
    assert isinstance(Rule(written, silu).find(products(gm)[-1]), Match)


def test_a_rule_whose_output_matches_again_runs_once_a_match():
    def relu(x):
        return aten.relu.default(x)

    def twice(x):
        return aten.relu.default(aten.relu.default(x))

    gm = lorafx.trace(nn.Sequential(nn.ReLU(), nn.ReLU()), torch.randn(5, 4))
    assert Rule(relu, twice).apply_everywhere(gm, "test") == 2
    assert len(gm.graph.find_nodes(op="call_function", target=aten.relu.default)) == 4
