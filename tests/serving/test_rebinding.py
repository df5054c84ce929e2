"""Rebinding: adapters of one form share what was made of a graph, and each reads its own tensors."""

import pytest
import torch
import transformers
from graphs import Chain
from serving_models import served

import lorafx
from lorafx.pipeline import Pipeline

RANDOM = {"target_modules": "all-linear", "init_lora_weights": False, "r": 2, "lora_dropout": 0.0}


@pytest.fixture
def runs(monkeypatch):
    """How often a pipeline was run."""
    counted, real = [], Pipeline.run
    monkeypatch.setattr(Pipeline, "run", lambda *args, **kwargs: (counted.append(1), real(*args, **kwargs))[1])
    return counted


def llama():
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2)).eval()


@pytest.mark.parametrize(
    ("model", "given"), [(Chain, torch.ones(5, 4)), (llama, torch.arange(10)[None].repeat(2, 1))], ids=["one", "blocks"]
)
def test_an_adapter_of_the_same_form_is_rewritten_for_no_more(model, given, runs):
    lora = lorafx.compile(model(), RANDOM, random_state=0)
    lora.add_adapter("other", RANDOM, random_state=1)
    first = lora(given)
    assert len(runs) == 1
    lora.set_adapter("other")
    second = lora(given)
    assert len(runs) == 1 and served(lora) == ["graph", "graph"]
    lora.set_adapter("default")
    found = [lora(given), (lora.set_adapter("other"), lora(given))[1]]
    assert len(runs) == 1
    plain = lora.merge_and_unload()(given)
    outputs = [each if isinstance(each, torch.Tensor) else each.logits for each in (first, second, *found, plain)]
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])
    assert not torch.allclose(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[1], outputs[4], rtol=1e-4, atol=1e-5)


def test_the_other_adapter_trains_and_the_graph_names_it(runs):
    lora, x = lorafx.compile(Chain(), RANDOM, random_state=0), torch.ones(5, 4)
    lora.add_adapter("other", RANDOM, random_state=1)
    lora(x)
    lora.set_adapter("other")
    lora(x).sum().backward()
    trained = [name for name, p in lora.named_parameters() if p.grad is not None]
    assert len(runs) == 1 and len(trained) == 4 and all(".other." in name for name in trained)
    assert ".default." not in " ".join(str(node.target) for node in lora.graph(x).graph.nodes)


@pytest.mark.parametrize("other", [{"r": 3}, {"lora_alpha": 3}, {"target_modules": ["second"]}, {"lora_dropout": 0.5}])
def test_an_adapter_of_another_form_is_rewritten_for(other, runs):
    lora, x = lorafx.compile(Chain(), RANDOM, random_state=0), torch.ones(50, 4)
    lora.add_adapter("other", RANDOM | other, random_state=1)
    first = lora(x)
    lora.set_adapter("other")
    assert not torch.allclose(lora(x), first) and len(runs) == 2
    expected = lora(x) if "lora_dropout" in other else lora.eval()(x)
    if "lora_dropout" not in other:
        torch.testing.assert_close(lora.merge_and_unload()(x), expected)
    else:
        assert not torch.equal(lora(x), expected), "dropout acts"


@pytest.mark.usefixtures("early")
def test_an_adapter_whose_like_has_a_graph_does_not_wait_for_one():
    lora, x = lorafx.compile(Chain(), RANDOM, random_state=0), torch.ones(5, 4)
    lora.add_adapter("other", RANDOM, random_state=1)
    for _ in range(4):
        lora(x)
    lora.set_adapter("other")
    lora(x)
    assert served(lora) == ["graph", "graph"]


def test_a_merged_adapters_graph_is_not_taken_for_one_that_acts(runs):
    lora, x = lorafx.compile(Chain(), RANDOM, random_state=0), torch.ones(5, 4)
    lora.merge_adapter()
    merged = lora(x)
    lora.unmerge_adapter()
    torch.testing.assert_close(lora(x), merged)
    assert len(runs) == 2
