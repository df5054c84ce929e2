"""The adapters of a model: added, loaded, made active, switched off, deleted."""

import copy

import pytest
import torch
from graphs import Chain, adapted

import lorafx
from lorafx.errors import AdapterError, ConfigError
from lorafx.tree import memory
from lorafx.tree.attached import Held


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


@pytest.mark.parametrize("merged", [False, True])
def test_of_blocks_without_adapters_the_last_to_end_puts_all_back(merged):
    lora, x = adapted(Chain(), target_modules=["second"]), torch.randn(5, 4)
    there = lora(x)
    if merged:
        lora.merge_adapter()
    first, second, third = lora.disable_adapter(), lora.disable_adapter(), lora.disable_adapter()
    base = copy.deepcopy(lora)
    with base.disable_adapter():
        without = base(x)
    for block in (first, second, third):
        block.__enter__()
    for block in (second, first):
        block.__exit__(None, None, None)
        assert torch.equal(lora(x), without) and not lora(x).requires_grad
    third.__exit__(None, None, None)
    assert lora.merged_adapters == ["default"] * merged
    torch.testing.assert_close(lora(x), there)
    assert lora.second.lora_A.default.weight.requires_grad


def test_switching_a_merged_model_unmerges_first():
    lora, x = adapted(Chain()), torch.randn(5, 4)
    before = lora(x)
    lora.merge_adapter()
    with pytest.warns(UserWarning, match="unmerged"):
        lora.set_adapter("default")
    assert lora.merged_adapters == [] and torch.equal(lora(x), before)


def test_pefts_keywords_of_adding_and_loading(tmp_path):
    lora = adapted(Chain().bfloat16())
    lora.save_pretrained(tmp_path)
    result = lora.load_adapter(tmp_path, "other", False, "cpu", autocast_adapter_dtype=False, low_cpu_mem_usage=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    lora.add_adapter("third", lora.peft_config["default"], low_cpu_mem_usage=True, autocast_adapter_dtype=True)
    dtypes = [lora.get_parameter(f"first.lora_A.{name}.weight").dtype for name in ("default", "other", "third")]
    assert dtypes == [torch.float32, torch.bfloat16, torch.float32]
    assert lora.get_parameter("first.lora_A.third.weight").is_meta
    lora.set_adapter("third")
    with pytest.raises(AdapterError, match=r"first\.lora_A\.third\.weight is on the meta device"):
        lora(torch.ones(2, 4, dtype=torch.bfloat16))
    lora.load_adapter(tmp_path, "third", is_trainable=True)
    values = [lora.get_parameter(f"first.lora_A.{name}.weight") for name in ("third", "default")]
    assert torch.equal(*values) and values[0].requires_grad
    for refused in ({"ephemeral_gpu_offload": True}, {"key_mapping": {"a": "b"}}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ConfigError, match=next(iter(refused))):
            lora.load_adapter(tmp_path, "fourth", **refused)
    with pytest.raises(ConfigError, match="no option nonsense"):
        lora.load_adapter(tmp_path, "fourth", nonsense=1)


def test_adapters_that_train_the_same_biases_are_remarked_on():
    lora = adapted(Chain(), target_modules=["second"], bias="all")
    with pytest.warns(UserWarning, match=r"'b' and 'default' each train their own second.bias"):
        lora.add_adapter("b", {"target_modules": ["second"], "bias": "lora_only"})
    with pytest.raises(AdapterError, match="cannot be active together"):
        lora.set_adapter(["default", "b"])


def test_who_deletes_an_adapter_leaves_the_programs_of_others():
    lora, x = adapted(Chain()), torch.randn(5, 4)
    lora.add_adapter("other", {"r": 3, "target_modules": ["first"], "init_lora_weights": False})
    with lora.disable_adapter():
        base = lora.graph(x)
    lora.set_adapter("other")
    theirs, expected = lora.graph(x), lora(x)
    lora.set_adapter("default")
    lora(x)
    lora.delete_adapter("default")
    assert lora.active_adapters == ["other"] and lora.graph(x) is theirs and torch.equal(lora(x), expected)
    with lora.disable_adapter():
        assert lora.graph(x) is base
    lora.add_adapter("default", {"r": 2, "target_modules": ["second"], "init_lora_weights": False})
    lora.set_adapter("default")
    assert lora.graph(x) is not theirs and not torch.allclose(lora(x), expected)


def test_adapters_whose_names_begin_alike_are_not_deleted_together():
    lora, x = adapted(Chain()), torch.randn(5, 4)
    for name in ("a", "a, of any scale", "a, b"):
        lora.add_adapter(name, {"r": 2, "target_modules": ["first"], "init_lora_weights": False})
    kept = {}
    for name in ("a, of any scale", "a, b"):
        lora.set_adapter(name)
        kept[name] = lora.graph(x)
    lora.delete_adapter("a")
    for name, graph in kept.items():
        lora.set_adapter(name)
        assert lora.graph(x) is graph


def flags(lora):
    return {name: lora.get_parameter(f"second.lora_A.{name}.weight").requires_grad for name in lora.peft_config}


def test_who_trains_is_who_is_active_until_somebody_says_otherwise():
    lora = adapted(Chain())
    lora.add_adapter("b", {"target_modules": ["second"]})
    assert flags(lora) == {"default": True, "b": False}
    lora.set_adapter(["default", "b"], inference_mode=True)
    assert flags(lora) == {"default": False, "b": False} and lora.active_adapters == ["default", "b"]
    lora.add_adapter("c", {"target_modules": ["second"]})
    assert flags(lora) == {"default": False, "b": False, "c": False}, "adding one lets no other train"
    lora.set_adapter(["b", "c"])
    lora.set_requires_grad("b", False)
    lora.delete_adapter("default")
    assert flags(lora) == {"b": False, "c": True}, "nor does deleting one that does not act"
    lora.set_adapter("b")
    assert flags(lora) == {"b": True, "c": False}


def test_an_adapter_loaded_to_train_does_so_at_once_and_others_when_they_become_active(tmp_path):
    lora = adapted(Chain())
    lora.save_pretrained(tmp_path)
    lora.load_adapter(tmp_path, "trained", is_trainable=True)
    lora.load_adapter(tmp_path, "loaded")
    assert flags(lora) == {"default": True, "trained": True, "loaded": False}
    lora.set_adapter("loaded", inference_mode=True)
    assert flags(lora) == {"default": False, "trained": False, "loaded": False}
    lora.set_adapter("loaded")
    assert flags(lora) == {"default": False, "trained": False, "loaded": True}
    with lora.disable_adapter():
        pass
    assert flags(lora)["loaded"], "it is no longer one for inference alone"


def test_what_somebody_lets_train_himself_is_frozen_when_others_become_active():
    lora = adapted(Chain())
    for name in "bcd":
        lora.add_adapter(name, {"target_modules": ["second"]})
    lora.set_requires_grad("b")
    for name, parameter in lora.named_parameters():
        if ".c." in name:
            parameter.requires_grad_(True)
    with lora.disable_adapter():
        assert not any(flags(lora).values())
    assert flags(lora) == {"default": True, "b": True, "c": True, "d": False}
    lora.set_adapter("d")
    assert flags(lora) == {"default": False, "b": False, "c": False, "d": True}
    lora.set_adapter("b")
    assert flags(lora) == {"default": False, "b": True, "c": False, "d": False}


def test_switching_looks_at_the_tensors_of_no_third_adapter(monkeypatch):
    looked, lora = [], adapted(Chain())
    for name in "abcdef":
        lora.add_adapter(name, {"target_modules": ["first", "second"]})
    monkeypatch.setattr(Held, "set_trainable", lambda self, trains: looked.extend(self.ways.paths))
    lora.set_adapter("e")
    assert looked and not [path for path in looked if ".default." not in path and ".e." not in path]


def test_adding_and_merging_look_at_the_memory_of_no_other_adapter(monkeypatch):
    looked, lora = [], adapted(Chain())
    lora.add_adapter("b", {"target_modules": ["first", "second"]})
    monkeypatch.setattr(memory, "storage_of", lambda tensor: looked.append(tensor) or 0)
    lora.add_adapter("c", {"target_modules": ["first", "second"]})
    assert not looked
    lora.merge_adapter()
    assert looked and {id(tensor) for tensor in looked} <= {id(tensor) for tensor in lora.get_base_model().parameters()}


def test_several_are_deleted_at_once_or_none():
    lora = adapted(Chain())
    for name in "bc":
        lora.add_adapter(name, {"target_modules": ["second"]})
    with pytest.raises(AdapterError, match="no adapter 'nobody'"):
        lora.delete_adapter(["b", "nobody"])
    assert list(lora.peft_config) == ["default", "b", "c"]
    lora.delete_adapter(["default", "b"])
    assert list(lora.peft_config) == lora.active_adapters == ["c"]


class Switching(Chain):
    """A model that does something between its layers."""

    between = staticmethod(lambda: None)

    def forward(self, x):
        h = torch.relu(self.first(x))
        self.between()
        return self.second(h)


def disabled(adaptation):
    with adaptation.disable_adapter():
        pass


CHANGES = {
    "disable_adapter_layers": disabled,
    "set_adapter": lambda adaptation: adaptation.set_adapter("default"),
    "merge_adapter": lambda adaptation: adaptation.merge_adapter(),
    "set_scale": lambda adaptation: adaptation.set_scale("default", 2.0),
    "rescale": lambda adaptation: adaptation.rescale(2.0),
}


@pytest.mark.filterwarnings("ignore:.*could not be captured")
@pytest.mark.parametrize(("change", "capture"), [*((each, "sites") for each in CHANGES), ("set_adapter", "auto")])
def test_what_acts_does_not_change_within_a_call(change, capture):
    lora, x = lorafx.compile(Switching(), {"target_modules": "all-linear"}, capture=capture), torch.randn(2, 4)
    adaptation = lorafx.of(lora)
    lora.between = lambda: CHANGES[change](adaptation)
    with pytest.raises(AdapterError, match=rf"^{change}\(\) within a call of the model that it changes"):
        lora(x)
    lora.between = lambda: None
    assert lora(x).requires_grad and lora.active_adapters == ["default"] and not lora.merged_adapters


def test_a_hook_runs_the_model_as_it_likes_and_leaves_it_as_it_was():
    lora, x, seen = adapted(Chain()), torch.randn(2, 4), []

    def base(*_):
        if not lorafx.of(lora)._lorafx.disabled:
            with lora.disable_adapter():
                seen.append(lora(x))

    expected = lora(x)
    handle = lora.second.register_forward_hook(base)
    torch.testing.assert_close(lora(x), expected)
    torch.testing.assert_close(seen[0], lora._lorafx.base(x))
    handle.remove()
    lora.second.register_forward_pre_hook(lambda *_: lora.disable_adapter_layers())
    with pytest.raises(AdapterError, match=r"a hook below .* changed which adapters act"):
        lora(x)


def test_weights_in_a_list_of_their_own_are_refused():
    """They would be taken for `inference_mode`."""
    lora = lorafx.compile(Chain(), {"target_modules": ["first"], "r": 2}, adapter_name="a")
    with pytest.raises(ConfigError, match="weights go with the names"):
        lora.set_adapter(["a"], [0.7])
    assert all(parameter.requires_grad for name, parameter in lora.named_parameters() if "lora_" in name)
