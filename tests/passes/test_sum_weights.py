"""sum_weights: an update by a matrix of the weight's size is added to the weight, where that rounds no more."""

from __future__ import annotations

import pytest
import torch
from graphs import INSERT, Chain, run, text

import lorafx
from lorafx.graph import ADAPTED_BY, SITE
from lorafx.passes import ElideCasts, ElideDropout, SumWeights

APART = (*INSERT, ElideCasts(), ElideDropout())
HIRA = lorafx.HiraConfig(r=2, init_weights=False, target_modules=["second"])


def pair(x, model=None, config=HIRA):
    lora = lorafx.compile(Chain() if model is None else model, config, capture="graph")
    return [run(lora, passes, x) for passes in (APART, (*APART, SumWeights()))]


def test_before_and_after():
    graphs = pair(x := torch.randn(5, 2, 4, dtype=torch.float64), Chain().double())
    before, after = map(text, graphs)
    assert [line for line in before if "linear(relu" in line or "add" in line] == [
        "linear_1 = linear(relu, second_weight, second_bias)",
        "linear_2 = linear(relu, mul)",
        "add = add.Tensor(linear_1, linear_2)",
    ]
    assert after[-2:] == ["add_1 = add.Tensor(second_weight, mul)", "linear_3 = linear(relu, add_1, second_bias)"]
    torch.testing.assert_close(graphs[1](x), graphs[0](x), rtol=1e-12, atol=1e-12)
    node = next(node for node in graphs[1].graph.nodes if node.name == "linear_3")
    assert node.meta[SITE] and node.meta[ADAPTED_BY]


class TwoPaths(Chain):
    """A base that itself adds the product with a matrix to a linear's."""

    def __init__(self):
        super().__init__()
        self.beside = torch.nn.Parameter(torch.randn_like(self.second.weight))

    def forward(self, x):
        hidden = self.first(x).relu()
        return self.second(hidden) + torch.nn.functional.linear(hidden, self.beside)


def test_what_no_adapter_adds_stays_a_sum_of_results():
    config = lorafx.HiraConfig(r=2, init_weights=False, target_modules=["first"])
    graphs = pair(torch.randn(5, 2, 4), TwoPaths(), config)
    before, after = ([line for line in text(gm) if "linear(relu" in line] for gm in graphs)
    assert text(graphs[0]) != text(graphs[1]), "the adapter's own sum is one of weights"
    assert len(before) == len(after) == 2


def test_half_precision_keeps_small_updates_apart():
    graphs = pair(torch.randn(5, 2, 4).bfloat16(), Chain().bfloat16())
    assert text(graphs[0]) == text(graphs[1])


@pytest.mark.parametrize(
    "config",
    [
        HIRA,
        lorafx.ShiraConfig(r=1, target_modules=["second"], init_weights=False),
        lorafx.MissConfig(r=3, target_modules=["second"], init_weights="bat"),
    ],
    ids=lambda config: config.peft_type,
)
def test_without_a_graph_there_is_one_product_too(config, monkeypatch):
    lora, x = lorafx.compile(Chain(), config, capture="sites"), torch.randn(64, 4)
    with torch.no_grad():
        for parameter in lora.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    summed = lora(x)
    monkeypatch.setattr(type(lora._lorafx.adapters["default"].kind), "fused", lambda *_: None)
    assert not torch.equal(summed, lora(x)), "the sums are others"
    torch.testing.assert_close(lora(x), summed, rtol=1e-5, atol=1e-5)  # sums of 6 products in float32
