"""What an adapted model is besides a module tree: who acts, in which order, and what its configs look like."""

import peft
import pytest
import torch
from torch import nn

import lorafx
from lorafx.errors import AdapterError


@pytest.fixture
def lora():
    config = {"target_modules": ["0"], "r": 2, "init_lora_weights": False}
    lora = lorafx.compile(nn.Sequential(nn.Linear(3, 5), nn.ReLU()), config, adapter_name="a")
    lora.add_adapter("b", config)
    return lora


def test_merged_adapters_are_innermost_and_none_acts_twice(lora):
    state = lora._lorafx
    lora.set_adapter(["a", "b"])
    lora.merge_adapter(["b"])
    assert [adapter.name for adapter in state.context.adapters] == ["b", "a"]
    assert state.context.merged == {"b"}


def test_while_adapters_are_disabled_none_acts_and_who_will_is_known(lora):
    state, x = lora._lorafx, torch.randn(2, 3)
    with lora.disable_adapter():
        assert (state.acting, state.active) == ((), ("a",))
        base = lora(x)
    assert state.acting == ("a",) and not torch.equal(lora(x), base)


def test_configs_are_those_of_now_and_not_to_be_written_to(lora):
    configs = lora.peft_config
    lora.delete_adapter("b")
    assert list(configs) == ["a"] and len(configs) == 1 and configs["a"].r == 2
    with pytest.raises(AdapterError, match="add_adapter"):
        configs["b"] = configs["a"]
    with pytest.raises(AdapterError, match="add_adapter"):
        peft.get_peft_model(lora, peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(KeyError):
        configs["b"]
