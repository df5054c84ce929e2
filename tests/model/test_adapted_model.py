"""AdaptedModel: called like the base model, an instance of its class, one tree."""

import copy
import inspect

import pytest
import torch
from graphs import Chain, adapted
from modules import ids, tiny_llama
from torch import nn

import lorafx


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    model = tiny_llama(num_hidden_layers=1).eval()
    return model, adapted(model, target_modules=["q_proj", "v_proj"]).eval()


def test_it_is_an_instance_of_the_base_models_class(llama):
    model, lora = llama
    assert isinstance(lora, type(model)) and isinstance(lora, lorafx.AdaptedModel)
    assert type(lora).__name__ == "LlamaForCausalLM"
    assert inspect.signature(lora.forward) == inspect.signature(model.forward)
    assert lora.config is model.config and lora.get_base_model() is lora


@pytest.mark.slow
@pytest.mark.usefixtures("as_shipped")
def test_the_base_object_knows_no_adapter(llama):
    model, lora = llama
    keys = set(tiny_llama(num_hidden_layers=1).state_dict())
    tokens = ids(2, 5)
    with torch.no_grad():
        base, with_adapter = model(input_ids=tokens).logits, lora(input_ids=tokens).logits
    assert set(model.state_dict()) == keys and not torch.allclose(base, with_adapter)
    assert type(model) is not type(lora)


def test_names_are_the_base_models_with_adapters_beside(llama):
    model, lora = llama
    names = dict(lora.named_parameters())
    assert set(dict(model.named_parameters())) <= set(names)
    added = set(names) - set(dict(model.named_parameters()))
    assert added == {f"model.layers.0.self_attn.{site}_proj.lora_{m}.default.weight" for site in "qv" for m in "AB"}
    assert all(names[name] is parameter for name, parameter in model.named_parameters())


def test_positional_and_keyword_calls_agree():
    lora, x = adapted(Chain()), torch.randn(5, 4)
    assert torch.equal(lora(x), lora(x=x)) and len(lora.report().graphs) == 1


def test_a_batch_of_another_size_reuses_the_graph():
    lora = adapted(Chain())
    for batch in (5, 2, 9):
        lora(torch.randn(batch, 4))
    assert len(lora.report().graphs) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("as_shipped")
def test_a_part_alone_is_called_with_its_adapters(llama):
    model, lora = llama
    tokens = ids(2, 5)
    with torch.no_grad():
        hidden = lora.model(input_ids=tokens).last_hidden_state
        assert not torch.allclose(hidden, model.model(input_ids=tokens).last_hidden_state)
        torch.testing.assert_close(lora.lm_head(hidden), lora(input_ids=tokens).logits)
        first = lora.model.layers[0].self_attn.q_proj(hidden)
        assert not torch.allclose(first, model.model.layers[0].self_attn.q_proj(hidden))


@pytest.mark.slow
def test_generate_runs_through_the_graphs(llama):
    model, lora = llama
    tokens = ids(2, 5)
    out = lora.generate(tokens, max_new_tokens=6, do_sample=False)
    merged = copy.deepcopy(lora).merge_and_unload()
    assert torch.equal(out, merged.generate(tokens, max_new_tokens=6, do_sample=False))
    assert type(merged) is type(model)


def test_graphs_follow_the_tree():
    """A captured graph reads what the tree has now: values loaded in place, a new parameter, another module."""
    model, x = Chain(), torch.randn(5, 4)
    lora = adapted(model, target_modules=["first"])
    lora(x)
    lora.load_state_dict({"second.weight": torch.zeros(3, 6)}, strict=False)
    assert not model.second.weight.any(), "one tensor, two names for it"
    assert torch.equal(lora(x), model.second.bias.expand(5, 3))
    lora.second.bias = nn.Parameter(torch.full((3,), 2.0))
    assert torch.equal(lora(x), torch.full((5, 3), 2.0)) and torch.equal(model(x), lora(x))
    lora.second = nn.Linear(6, 3)
    with torch.no_grad():
        lora.second.weight.zero_()
        lora.second.bias.fill_(3.0)
    assert torch.equal(lora(x), torch.full((5, 3), 3.0))


def test_deepcopy_is_independent():
    lora, x = adapted(Chain()), torch.randn(5, 4)
    before = lora(x)
    other = copy.deepcopy(lora)
    assert torch.equal(other(x), before)
    assert other._lorafx.dispatcher is not lora._lorafx.dispatcher and len(other.report().graphs) == 1
    with torch.no_grad():
        other.first.weight.zero_()
    assert torch.equal(lora(x), before) and not torch.equal(other(x), before)


def test_state_dict_round_trips():
    lora, other = adapted(Chain()), adapted(Chain(), r=2)
    with torch.no_grad():
        other.second.lora_B.default.weight.add_(1)
    other.load_state_dict(lora.state_dict())
    x = torch.randn(5, 4)
    assert torch.equal(lora(x), other(x))


def test_hooks_of_the_base_stay_with_the_base():
    model, seen = Chain(), []
    lora = adapted(model)
    lora.register_forward_hook(lambda *_: seen.append("lora"))
    model(torch.randn(5, 4))
    assert seen == []
    lora(torch.randn(5, 4))
    assert seen == ["lora"]


@pytest.mark.slow
def test_no_names_of_adapters_are_as_good_as_none():
    class Takes(Chain):
        def forward(self, x, **rest):
            return super().forward(x)

    lora, x = adapted(Takes()), torch.randn(5, 4)
    assert torch.equal(lora(x, adapter_names=None), lora(x))
