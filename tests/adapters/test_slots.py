"""Slots: what of a padded adapter is its own, what differs between two, and what room is made for."""

import pytest
import torch
from graphs import Chain, adapted

from lorafx.adapters.kinds import LoraConfig
from lorafx.adapters.planning import plan
from lorafx.adapters.slots import add_idle, differences, put, require_swappable, used, widened, without_room
from lorafx.errors import AdapterError
from lorafx.tree.mirror import mirrored


@pytest.fixture
def lora():
    return adapted(Chain(), target_modules=["second"])


def slot_of(lora, r=5):
    """The adapter with room for rank `r` and for the first layer, hung in the tree."""
    adapter = lora._lorafx.adapters["default"]
    config = LoraConfig(r=r, target_modules=["first", "second"])
    other = plan(mirrored(lora), "default", config)
    slot, made = widened(lora, adapter, [other], r)
    add_idle(lora, adapter, [other], autocast_adapter_dtype=True)
    for path, tensor in made.items():
        owner, _, name = path.rpartition(".")
        lora.get_submodule(owner)._parameters[name] = tensor
    return slot


def test_a_slot_has_more_sites_and_larger_tensors_and_is_the_same_adapter(lora):
    own = {path: tensor.clone() for path, tensor in lora.named_parameters() if "lora_" in path}
    slot = slot_of(lora)
    assert slot.idle == {"first"} and {site.name for site in slot.selection} == {"first", "second"}
    assert [site.name for site in used(slot).selection] == ["second"] and used(used(slot)) == used(slot)
    large = {path: lora.get_parameter(path) for path in used(slot).paths}
    assert {tuple(tensor.shape) for tensor in large.values()} == {(5, 6), (3, 5)}
    found = without_room(slot, large)
    assert found.keys() == own.keys() and all(torch.equal(found[path], own[path]) for path in own)
    assert not any(lora.get_parameter(path).any() for path in slot.tensors["first"].values())


def test_what_is_put_into_room_leaves_nothing_of_what_was_there(lora):
    slot = slot_of(lora)
    path = slot.tensors["second"]["lora_A.weight"]
    put(lora, slot, {path: torch.ones(5, 6)})
    put(lora, slot, {path: torch.full((1, 6), 2.0)})
    assert lora.get_parameter(path).sum() == 12 and not lora.get_parameter(path)[1:].any()


def test_differences_are_those_that_change_what_is_computed(lora):
    adapter = lora._lorafx.adapters["default"]

    def other(**changes):
        return plan(mirrored(lora), "default", adapter.config.replace(**changes))

    assert differences(adapter, other(r=3, lora_alpha=1), sizes=False) == []
    assert differences(adapter, other(r=3, lora_alpha=1)) == ["r", "lora_alpha"]
    assert differences(adapter, other(target_modules=["first"], revision="x", inference_mode=True)) == []
    assert differences(adapter, other(lora_dropout=0.1), sizes=False) == ["lora_dropout"]


def test_what_a_slot_cannot_take_is_said(lora):
    adapter = lora._lorafx.adapters["default"]

    def refused(**changes):
        found = plan(mirrored(lora), "default", adapter.config.replace(**changes))
        with pytest.raises(AdapterError) as error:
            require_swappable(lora, adapter, found)
        return str(error.value)

    assert "there is room for (2, 6)" in refused(r=3)
    assert "it adapts first" in refused(target_modules=["first", "second"])
    assert "they differ in lora_dropout" in refused(lora_dropout=0.5)
    assert "they differ in modules_to_save" in refused(modules_to_save=["first"])
    with pytest.raises(AdapterError, match="target_rank=1 leaves no room"):
        widened(lora, adapter, [], 1)
