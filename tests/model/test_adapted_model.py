"""AdaptedModel: called like the base model, an instance of its class, one tree."""

import copy
import inspect

import pytest
import torch
from graphs import Chain, adapted
from modules import ids, tiny_llama
from torch import nn

import lorafx
from lorafx.errors import AdapterError, ConfigError


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
    assert torch.equal(lora(x), lora(x=x)) and len(lora.report().graphs) == 2


def test_a_batch_of_another_size_reuses_the_graph():
    lora = adapted(Chain())
    for batch in (5, 2, 9):
        lora(torch.randn(batch, 4))
    assert len(lora.report().graphs) == 1


@pytest.mark.slow
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


@pytest.mark.slow
def test_an_adapter_of_the_name_of_one_that_was_deleted_is_another():
    lora, x = adapted(Chain().double()), torch.randn(5, 4, dtype=torch.float64)
    before = lora(x)
    lora.delete_adapter("default")
    again = {"r": 2, "lora_alpha": 10, "target_modules": "all-linear", "init_lora_weights": False}
    lora.add_adapter("default", again, random_state=0)
    lora.set_adapter("default")
    found = lora(x)
    lora.merge_adapter()
    torch.testing.assert_close(found, lora._lorafx.base(x), rtol=1e-13, atol=1e-13)
    assert not torch.allclose(found, before), "its scaling is another"


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


def test_adapters_are_added_switched_and_deleted():
    lora, x = adapted(Chain(), target_modules=["second"]), torch.randn(5, 4)
    first = lora(x)
    lora.add_adapter("other", {"r": 3, "target_modules": ["first"], "init_lora_weights": False})
    assert torch.equal(lora(x), first) and lora.active_adapters == ["default"]
    lora.set_adapter("other")
    second = lora(x)
    assert not torch.equal(first, second) and [site.name for site in lora.sites] == ["first"]
    lora.set_adapter("default")
    assert torch.equal(lora(x), first)
    lora.delete_adapter("default")
    assert lora.active_adapters == ["other"] and torch.equal(lora(x), second)
    assert not any("default" in name for name, _ in lora.named_parameters())
    with pytest.raises(AdapterError, match="no adapter 'default'"):
        lora.set_adapter("default")
    with pytest.raises(AdapterError, match="already"):
        lora.add_adapter("other", {"target_modules": ["first"]})


def test_a_new_adapter_under_an_old_name_is_not_the_old_one():
    lora, x = adapted(Chain(), target_modules=["second"]), torch.randn(5, 4)
    before = lora(x)
    lora.add_adapter("other", {"target_modules": ["first"]})
    lora.delete_adapter("default")
    lora.add_adapter("default", {"r": 4, "target_modules": ["first"], "init_lora_weights": False})
    lora.set_adapter("default")
    assert not torch.allclose(lora(x), before)


def test_disabling_gives_the_base_model_and_comes_back():
    model, x = Chain(), torch.randn(5, 4)
    lora = adapted(model)
    acting = lora(x)
    with lora.disable_adapter():
        assert torch.equal(lora(x), model(x))
        assert not any(p.requires_grad for p in lora.parameters())
    assert torch.equal(lora(x), acting)
    lora.merge_adapter()
    merged = model.first.weight.detach().clone()
    with lora.disable_adapter():
        assert not torch.equal(model.first.weight, merged)
    assert torch.equal(model.first.weight, merged) and lora.merged_adapters == ["default"]


def test_switching_a_merged_model_unmerges_first():
    lora, x = adapted(Chain()), torch.randn(5, 4)
    before = lora(x)
    lora.merge_adapter()
    with pytest.warns(UserWarning, match="unmerged"):
        lora.set_adapter("default")
    assert lora.merged_adapters == [] and torch.equal(lora(x), before)


def test_the_line_of_counts_is_pefts(capsys):
    lora = adapted(Chain(), target_modules=["second"])
    lora.print_trainable_parameters()
    trainable, total = 2 * 6 + 3 * 2, 24 + 21 + 18
    expected = f"trainable params: {trainable} || all params: {total} || trainable%: {100 * trainable / total:.4f}\n"
    assert capsys.readouterr().out == expected


def test_it_introduces_itself():
    assert repr(adapted(Chain())) == "AdaptedModel(Chain, 2 sites, adapters: default*)"


def test_hooks_of_the_base_stay_with_the_base():
    model, seen = Chain(), []
    lora = adapted(model)
    lora.register_forward_hook(lambda *_: seen.append("lora"))
    model(torch.randn(5, 4))
    assert seen == []
    lora(torch.randn(5, 4))
    assert seen == ["lora"]


def test_pefts_keywords_of_adding_and_loading(tmp_path):
    lora = adapted(Chain().bfloat16())
    lora.save_pretrained(tmp_path)
    result = lora.load_adapter(tmp_path, "other", False, "cpu", autocast_adapter_dtype=False, low_cpu_mem_usage=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    lora.add_adapter("third", lora.peft_config["default"], low_cpu_mem_usage=True, autocast_adapter_dtype=True)
    dtypes = [lora.get_parameter(f"first.lora_A.{name}.weight").dtype for name in ("default", "other", "third")]
    assert dtypes == [torch.float32, torch.bfloat16, torch.float32]
    assert lora.get_parameter("first.lora_A.third.weight").is_meta
    for refused in ({"ephemeral_gpu_offload": True}, {"key_mapping": {"a": "b"}}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ConfigError, match=next(iter(refused))):
            lora.load_adapter(tmp_path, "fourth", **refused)
    with pytest.raises(ConfigError, match="no option nonsense"):
        lora.load_adapter(tmp_path, "fourth", nonsense=1)


def test_what_is_not_there_is_refused_and_not_dropped():
    lora = adapted(Chain())
    with pytest.raises(AdapterError, match="set_scale"):
        lora.set_adapter({"default": 0.7})
    with pytest.raises(AdapterError, match="adapter_names, an adapter for each row, is not implemented"):
        lora(torch.randn(5, 4), adapter_names=["default"] * 5)


def test_no_names_of_adapters_are_as_good_as_none():
    class Takes(Chain):
        def forward(self, x, **rest):
            return super().forward(x)

    lora, x = adapted(Takes()), torch.randn(5, 4)
    assert torch.equal(lora(x, adapter_names=None), lora(x))
