"""share_input: adapted linears of one value are one operator, whose own backward is the equations'."""

from __future__ import annotations

import operator

import pytest
import torch
from graphs import INSERT, adapted, run, text
from modules import Fork, cases
from torch import nn

import lorafx
from lorafx.passes import ElideCasts, ElideDropout, FuseDropout, FuseLora, ShareInput

FUSED = (*INSERT, ElideCasts(), ElideDropout(), FuseLora())
shared = torch.ops.lorafx.lora_linears


def test_before_and_after():
    gm = run(adapted(Fork(), target_modules=["a", "c"]), (*FUSED, ShareInput()), torch.randn(5, 2, 4))
    assert text(gm)[1:11] == [
        "a_weight = a.weight",
        "a_bias = a.bias",
        "a_lora_a_default_weight = a.lora_A.default.weight",
        "a_lora_b_default_weight = a.lora_B.default.weight",
        "c_weight = c.weight",
        "c_bias = c.bias",
        "c_lora_a_default_weight = c.lora_A.default.weight",
        "c_lora_b_default_weight = c.lora_B.default.weight",
        "lora_linears = lorafx.lora_linears(sin, [a_weight, c_weight], [a_bias, c_bias], [a_lora_a_default_weight, "
        "c_lora_a_default_weight], [a_lora_b_default_weight, c_lora_b_default_weight], [3.0, 3.0])",
        "getitem = getitem(lora_linears, 0)",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [{}, {"b": 1, "c": 5}], ids=["one rank", "ranks"])
def test_a_model_trains_as_without_the_pass(ranks):
    gradients = []
    for passes in (lorafx.passes.default, lorafx.passes.default.without("share_input")):
        config = {"target_modules": "all-linear", "r": 2, "rank_pattern": ranks, "init_lora_weights": False}
        torch.manual_seed(0)
        lora = lorafx.compile(Fork().double(), config, random_state=0, pipeline=passes)
        x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
        lora(x).sin().sum().backward()
        gradients.append([x.grad, *(p.grad for p in lora.parameters() if p.requires_grad)])
        joint = [node for node in lora.graph(x).graph.nodes if node.target is shared.default]
        assert len(joint) == ("share_input" in str(passes))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class Twice(nn.Module):
    """Two linear layers of one value, which is written to in between if asked."""

    def __init__(self, writes):
        super().__init__()
        self.a, self.b, self.writes = nn.Linear(4, 3), nn.Linear(4, 3), writes

    def forward(self, x):
        x = x.sin()
        first = self.a(x)
        if self.writes:
            x[:2].add_(1.0)  # through a view, so that both layers are given the same value by name
        return first + self.b(x)


@pytest.mark.slow
@pytest.mark.parametrize("writes", cases([False, True], quick=[True]))
def test_what_is_written_in_between_is_seen(writes):
    lora, x = adapted(Twice(writes)), torch.randn(5, 4)
    joint = [node for node in lora.graph(x).graph.nodes if node.target is shared.default]
    assert len(joint) == (not writes)
    with torch.no_grad():
        plain = lorafx.compile(Twice(writes), {"target_modules": "all-linear", "r": 2, "lora_alpha": 6}, pipeline=FUSED)
        plain.load_state_dict(lora.state_dict())
        torch.testing.assert_close(lora(x), plain(x))


AFTER_FUSING = [(ShareInput(),), (FuseDropout(), ShareInput())]


@pytest.mark.parametrize("passes", cases(AFTER_FUSING, quick=AFTER_FUSING[1:]), ids=str)
def test_dropouts_of_their_own_are_different_values(passes):
    gm = run(adapted(Fork(), lora_dropout=0.5), (*FUSED, *passes), torch.randn(5, 4))
    assert all(node.target is not shared.default for node in gm.graph.nodes)


class Learned(nn.Module):
    """(…, 3) -> (…, 3): two linear layers of a value that is made of a parameter alone."""

    def __init__(self):
        super().__init__()
        self.query, self.a, self.b = nn.Parameter(torch.randn(4)), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        query = self.query.sin()
        return x + self.a(query) + self.b(query)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_value_that_is_made_of_parameters_is_shared_and_dropouts_of_it_are_not(dropout):
    gm = run(
        adapted(Learned(), target_modules=["a", "b"], lora_dropout=dropout), (*FUSED, ShareInput()), torch.randn(3)
    )
    joint = [node for node in gm.graph.nodes if node.target is shared.default]
    assert len(joint) == (not dropout)


@pytest.mark.slow
def test_parts_say_whose_they_are():
    gm = adapted(Fork()).graph(torch.randn(5, 4))
    parts = [node for node in gm.graph.nodes if node.target is operator.getitem]
    assert [node.meta["site"].name for node in parts] == ["a", "b", "c"]
    assert [node.meta["lorafx"].site for node in parts] == ["a", "b", "c"]
