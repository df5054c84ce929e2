"""The program maker: a kind of call that may wait for its graph does, and any other is served for good at once."""

import pytest
import torch
from graphs import Chain, adapted
from serving_models import served
from torch import nn

import lorafx

RANDOM = {"target_modules": "all-linear", "init_lora_weights": False, "r": 2}


def compiled(model, **options):
    return lorafx.compile(model, RANDOM, random_state=0, **options)


def captures(lora):
    return len(lora._lorafx.dispatcher.graphs.captures)


@pytest.mark.parametrize("capture, makes", [("auto", ["graph"]), ("graph", ["graph"]), ("sites", ["sites"])])
def test_who_asks_for_a_way_gets_it(capture, makes):
    lora = lorafx.compile(Chain(), {"target_modules": "all-linear", "r": 2}, capture=capture)
    lora(torch.randn(5, 4))
    assert served(lora) == makes


@pytest.mark.parametrize(
    "asked", [{"capture": "graph"}, {"backend": "aot_eager"}, {"example_inputs": (torch.ones(5, 4),)}]
)
def test_who_asks_for_a_graph_gets_it_at_once(asked, early):
    lora = compiled(Chain(), **asked)
    lora(torch.randn(5, 4))
    assert served(lora) == ["graph"] and lora.explain().calls[0].early == 0


def test_the_graph_of_a_call_takes_the_place_of_what_waited_for_it(early):
    lora, x = compiled(Chain()), torch.randn(5, 4)
    lora(x)
    assert lora.graph(x) is lora.graph(x)
    lora(x)
    assert served(lora) == ["graph"] and captures(lora) == 1 and lora.explain().calls[0].early == 1


def test_a_watched_pipeline_has_graphs_from_the_first_call(early):
    seen = []
    lora = compiled(Chain(), observers=[lambda previous, graph, following: seen.append(previous)])
    lora(torch.randn(5, 4))
    assert seen and served(lora) == ["graph"]


class Doubled(lorafx.Pass):
    """A pass of somebody's own, which changes what is computed."""

    def rewrite(self, gm, context):
        for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default):
            node.target = torch.ops.aten.relu_.default
        return 0


def test_a_pass_of_ones_own_acts_from_the_first_call(early):
    lora = compiled(Chain(), pipeline=lorafx.passes.default + [Doubled()])
    lora(torch.randn(5, 4))
    assert served(lora) == ["graph"]


def test_the_graph_of_a_call_is_the_one_that_serves_it():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.Linear(4, 4)

        def forward(self, x):
            h = x[:, 0]
            for step in range(int(x.shape[1])):
                h = torch.tanh(self.cell(h) + x[:, step])
            return h

    lora = adapted(Loop())
    calls = [torch.randn(2, length, 4) for length in (2, 3)]
    for x in (*calls, *calls):
        torch.testing.assert_close(lora.graph(x)(x), lora(x))
    assert [call.hits for call in lora.explain().calls] == [2, 2], "asking for a graph makes it, and is no call"


def test_graphs_may_be_forbidden(early):
    lora, x = compiled(Chain(), capture="sites"), torch.randn(5, 4)
    for _ in range(5):
        lora(x)
    (call,) = lora.explain().calls
    assert (call.served_by, call.hits, call.early, captures(lora)) == ("sites", 4, 0, 0) and "asked for" in call.reason
