"""caches: pytrees see their tensors and counters, and one graph fits a sliding window however full it is."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from torch.utils import _pytree as pytree
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer

from lorafx.capture.caches import branchless_windows, is_cache, is_length, parts, register_caches
from lorafx.graph.description import argument_key
from lorafx.serving.call_key import taken_apart

register_caches(nn.Module())


def filled(layers=2, length=3):
    cache = DynamicCache()
    for layer in range(layers):
        cache.update(torch.randn(1, 2, length, 4), torch.randn(1, 2, length, 4), layer)
    return cache


def test_a_cache_is_its_tensors_and_comes_back():
    cache = filled()
    leaves, spec = pytree.tree_flatten(cache)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    assert len(tensors) == 4 and tensors[0] is cache.layers[0].keys and tensors[3] is cache.layers[1].values
    again = spec.unflatten(leaves)
    assert type(again) is DynamicCache and again is not cache and vars(again).keys() == vars(cache).keys()
    assert [vars(layer) for layer in again.layers] == [vars(layer) for layer in cache.layers]


def test_flags_are_structure_and_counters_are_leaves():
    one, other = DynamicSlidingWindowLayer(sliding_window=5), DynamicSlidingWindowLayer(sliding_window=5)
    other.cumulative_length = 7
    assert pytree.tree_structure(one) == pytree.tree_structure(other)
    assert 7 in pytree.tree_leaves(other) and False not in pytree.tree_leaves(other)
    other.is_initialized = True
    assert pytree.tree_structure(one) != pytree.tree_structure(other)


def test_what_a_tree_map_puts_there_can_be_mapped_back():
    cache = filled(1)
    names = pytree.tree_map(lambda leaf: "text", cache)
    assert type(names) is DynamicCache and names.layers[0].keys == "text"
    assert pytree.tree_structure(names) == pytree.tree_structure(cache)


LAYERS = [*cache_utils.DYNAMIC_LAYER_TYPE_MAPPING.values(), *cache_utils.STATIC_LAYER_TYPE_MAPPING.values()]


@pytest.mark.parametrize("cls", dict.fromkeys(LAYERS), ids=lambda cls: cls.__name__)
def test_every_layer_that_a_cache_can_have_is_looked_into(cls):
    layer = cls(max_cache_len=8, sliding_window=5)
    assert is_cache(layer)
    leaves, spec = pytree.tree_flatten(layer)
    assert vars(spec.unflatten(leaves)) == vars(layer)


def test_the_states_of_linear_attention_are_leaves_and_whether_there_are_any_is_told_apart():
    layer = LinearAttentionLayer(number_of_states=2)
    assert not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(layer))
    empty = taken_apart((layer,), {})
    layer.update_conv_state(torch.randn(3, 6, 4), 1)
    layer.update_recurrent_state(torch.randn(3, 2, 5, 7), 0)
    leaves, _ = taken_apart((layer,), {})
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    assert tensors == [layer.conv_states[1], layer.recurrent_states[0]]
    assert [argument_key(leaf) for leaf in leaves] != [argument_key(leaf) for leaf in empty[0]]


class NotesCache:
    """A cache class of a model's own, as some define beside the model."""

    def __init__(self):
        self.state, self.name = torch.ones(2), "notes"


class Model(transformers.PreTrainedModel):
    config_class = transformers.LlamaConfig


def test_a_models_own_cache_is_registered_by_its_name():
    assert not is_cache(NotesCache())
    register_caches(Model(transformers.LlamaConfig()))
    assert is_cache(NotesCache()) and len(pytree.tree_leaves(NotesCache())) == 1


def test_which_leaves_count_tokens():
    assert is_length("past_key_values.layers.0.cumulative_length") and not is_length("past_key_values.layers.0.keys")


def windows(steps, branchless):
    """What a layer with a window of 5 gives for tokens that come in these steps, and what it then holds."""
    torch.manual_seed(0)
    layer, seen = DynamicSlidingWindowLayer(sliding_window=5), []
    for tokens in steps:
        with branchless_windows() if branchless else torch.no_grad():
            sizes = tuple(map(int, layer.get_mask_sizes(tokens)))
            keys, values = layer.update(torch.randn(1, 1, tokens, 2), torch.randn(1, 1, tokens, 2))
        seen += [torch.tensor(sizes), keys, values, layer.keys, layer.values]
    return seen


@pytest.mark.parametrize("steps", [(3,), (4,), (5,), (9,), (3, 1, 1, 1, 1), (7, 1, 1), (2, 6)], ids=str)
def test_windows_without_branches_hold_what_transformers_holds(steps):
    own = DynamicSlidingWindowLayer.update
    assert all(map(torch.equal, windows(steps, True), windows(steps, False)))
    assert DynamicSlidingWindowLayer.update is own


def test_numbers_that_are_equal_in_all_layers_of_a_class_play_one_part():
    cache = filled(layers=3)
    cache.layers[2].keys = torch.randn(1, 2, 5, 4)
    cache.layers.append(DynamicSlidingWindowLayer(sliding_window=5))
    cache.layers[3].update(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4))
    found = parts({"past": cache, "x": torch.ones(3, 4), "n": 3})

    def part(layer, name, method="size", index=2):
        return found.get((f"L['past']['layers'][{layer}]['{name}']", method, index))

    assert part(0, "values") == part(1, "values") == part(2, "values") is not None
    assert part(0, "keys", index=0) == part(2, "keys", index=0) not in (None, part(0, "values", index=0))
    assert part(0, "keys") is part(1, "keys") is part(2, "keys") is None, "one is longer"
    assert part(3, "values") not in (None, part(0, "values")), "another class"
    assert part(3, "cumulative_length", "", None) is not None and part(0, "values", "storage_offset", None) is not None
    assert all(name.startswith("L['past']") for name, _, _ in found)
