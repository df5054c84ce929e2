"""The graph builder: what calls of different adapters share of their graphs."""

import torch
from graphs import Chain, adapted


def test_adapters_of_other_ranks_share_the_capture_and_those_of_one_form_the_rewritten_graph():
    lora, x = adapted(Chain(), r=2), torch.randn(5, 4)
    graphs, config = lora._lorafx.dispatcher.graphs, lora.peft_config["default"]
    lora.add_adapter("same", config)
    lora.add_adapter("wide", {"r": 3, "target_modules": ["first"]})
    made = []
    for name in ("default", "same", "wide", "default", "wide"):
        lora.set_adapter(name)
        lora(x)
        made.append((len(graphs.captures), len(graphs.rewritten)))
    assert made == [(1, 1), (1, 1), (1, 2), (1, 2), (1, 2)]


def test_what_was_rewritten_for_an_adapter_goes_with_it():
    lora, x = adapted(Chain(), r=2), torch.randn(5, 4)
    graphs = lora._lorafx.dispatcher.graphs
    lora.add_adapter("wide", {"r": 3, "target_modules": ["first"]})
    for name in ("default", "wide"):
        lora.set_adapter(name)
        lora(x)
    graphs.forget("default")
    (left,) = graphs.rewritten
    assert [adapter.name for adapter in left.context.adapters] == ["wide"] and len(graphs.captures) == 1
