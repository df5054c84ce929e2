"""Layers with caches are traced once, whatever cache it is, and layers that differ are not taken for one another."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.fx.experimental import proxy_tensor
from torch.utils import _pytree as pytree
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

from lorafx.capture.caches import is_cache, is_length, register_caches
from lorafx.capture.export import trace_part
from lorafx.graph.blocks import block_calls, blocks_of
from lorafx.graph.modules import accepts

HEADS, WIDTH, WINDOW, ROOM = 2, 4, 5, 16

pytestmark = pytest.mark.slow  # several captures each


class Attending(nn.Module):
    """(batch, tokens, 6) -> the same, by what `look` finds in a cache for the layer's new keys and values."""

    def __init__(self, number, look):
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)
        self.number, self.look = number, look

    def forward(self, x, cache):
        q, k, v = (self.heads(projection(x)) for projection in (self.q, self.k, self.v))
        k, v = self.look(self.number, cache, k, v)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(attended.transpose(1, 2).flatten(2))

    def heads(self, x):
        return x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)


def own(number, cache, k, v):
    return cache.update(k, v, number)


class Decoder(nn.Module):
    def __init__(self, depth, look):
        super().__init__()
        self.layers = nn.ModuleList(Attending(number, look) for number in range(depth))

    def forward(self, x, cache):
        for layer in self.layers:
            x = layer(x, cache)
        return x


def both(number, cache, k, v):
    """Keys of this side, and of the other, which are computed once."""
    crossed = cache.cross_attention_cache
    if not cache.is_updated.get(number):
        crossed.update(k[:, :, :1], v[:, :, :1], number)
        cache.is_updated[number] = True
    k, v = cache.self_attention_cache.update(k, v, number)
    there = crossed.layers[number]
    return torch.cat([there.keys, k], 2), torch.cat([there.values, v], 2)


def layers_of(*makes):
    return lambda depth: Cache(layers=[makes[number % len(makes)]() for number in range(depth)])


def sliding():
    return DynamicSlidingWindowLayer(sliding_window=WINDOW)


def static():
    return StaticLayer(max_cache_len=ROOM)


def static_sliding():
    return StaticSlidingWindowLayer(max_cache_len=ROOM, sliding_window=WINDOW)


CACHES = {  # how to make a cache for so many layers, and how a layer uses it
    "dynamic": (layers_of(DynamicLayer), own),
    "that grows": (lambda depth: DynamicCache(), own),
    "sliding": (layers_of(sliding), own),
    "static": (layers_of(static), own),
    "static and sliding": (layers_of(static_sliding), own),
    "encoder-decoder": (lambda depth: EncoderDecoderCache(DynamicCache(), DynamicCache()), both),
}


def started(make, look, depth, tokens):
    """A model, its input, and a cache that has seen so many tokens, on which the input goes on."""
    torch.manual_seed(0)
    model, cache = Decoder(depth, look), make(depth)
    register_caches(model)
    with torch.no_grad():
        if tokens:
            model(torch.randn(2, tokens, 6), cache)
    return model, torch.randn(2, 1 if tokens else 3, 6), cache


def counters(*args):
    """The numbers of the arguments' leaves that count tokens, which a graph is given as inputs."""
    leaves, _ = pytree.tree_flatten_with_path((args, {}))
    return [number for number, (path, leaf) in enumerate(leaves) if type(leaf) is int and is_length(path[-1].key)]


def captured(model, x, cache, once=True):
    with torch.no_grad():
        return trace_part(model, "", (x, cache), {}, counters(x, cache), once=once)


def outcome(function, x, cache):
    """What a function gives and all that the cache then holds; of a graph, the cache that it gives, if it gives one."""
    cache = copy.deepcopy(cache)
    with torch.no_grad():
        output = function(x, cache)
    if isinstance(output, tuple):
        output, filled = output
        cache = filled.get("1", cache)
    return [("output", output), *held("cache", cache)]


def held(name, value):
    """The values in a cache, each with its name."""
    if is_cache(value):
        value = {key: vars(value)[key] for key in sorted(vars(value))}
    if not isinstance(value, (dict, list)):
        yield name, value
        return
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from held(f"{name}.{key}", item)


def same(ours, theirs):
    return [name for name, _ in ours] == [name for name, _ in theirs] and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for (_, a), (_, b) in zip(ours, theirs)
    )


@pytest.mark.parametrize("tokens", [0, 4])
@pytest.mark.parametrize("name", CACHES)
def test_how_much_is_traced_does_not_depend_on_depth(name, tokens, monkeypatch):
    traced, proxy_call = [], proxy_tensor.proxy_call
    monkeypatch.setattr(proxy_tensor, "proxy_call", lambda *args: traced.append(args[2]) or proxy_call(*args))
    counts = []
    for depth in (2, 6):
        traced.clear()
        gm = captured(*started(*CACHES[name], depth, tokens))
        counts.append(len(traced))
        assert len(list(block_calls(gm))) == depth and len(blocks_of(gm)) == 1
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("tokens", [0, 4])
@pytest.mark.parametrize("name", CACHES)
def test_it_computes_and_keeps_what_the_model_does(name, tokens):
    model, x, cache = started(*CACHES[name], 3, tokens)
    ours, all_traced = (captured(model, x, cache, once=once) for once in (True, False))
    expected = outcome(model, x, cache)
    assert same(outcome(ours, x, cache), expected) and same(outcome(all_traced, x, cache), expected)
    if tokens:
        with torch.no_grad():
            model(x, cache)  # and for one more token in the cache
        if accepts(ours, (x, cache), {}):
            assert same(outcome(ours, x, cache), outcome(model, x, cache))


def shared(number, cache, k, v):
    """All layers read what the first has in the cache."""
    if number == 0:
        cache.update(k, v, 0)
    return cache.layers[0].keys, cache.layers[0].values


def skipping(number, cache, k, v):
    return (k, v) if number == 2 else cache.update(k, v, number)


def previous(number, cache, k, v):
    """Each layer fills its own, and reads what the one before has."""
    k, v = cache.update(k, v, number)
    before = cache.layers[max(number - 1, 0)]
    return before.keys, before.values


def crossing(number, cache, k, v):
    """A layer adds to what the one before has in a static cache."""
    k, v = cache.update(k, v, number)
    if number:
        cache.layers[number - 1].keys.mul_(0.5)
    return cache.layers[max(number - 1, 0)].keys, v


ODD = {  # and the kinds of layers, of which each is traced once, of five layers
    "every second with a window": (layers_of(sliding, DynamicLayer), own, [0, 1, 0, 1, 0]),
    "every second with a window, static": (layers_of(static_sliding, static), own, [0, 1, 0, 1, 0]),
    "others' caches": (layers_of(DynamicLayer), shared, [None, 0, 0, 0, 0]),
    "one skips its cache": (layers_of(DynamicLayer), skipping, [0, 0, None, 0, 0]),
    "the cache of the layer before": (layers_of(DynamicLayer), previous, [None, 0, 0, 0, 0]),
    "writing to the cache of the layer before": (layers_of(static), crossing, [None, 0, 0, 0, 0]),
}


@pytest.mark.parametrize("tokens", [0, 4])
@pytest.mark.parametrize("name", ODD)
def test_layers_that_differ_are_not_taken_for_one_another(name, tokens):
    make, look, kinds = ODD[name]
    model, x, cache = started(make, look, 5, tokens)
    gm = captured(model, x, cache)
    assert same(outcome(gm, x, cache), outcome(model, x, cache))
    blocks = blocks_of(gm)
    found = {path: blocks.index(block) for _, block, path in block_calls(gm)}
    assert [found.get(f"layers.{number}") for number in range(5)] == kinds


def test_a_graph_of_caches_of_one_length_takes_no_others():
    model, x, cache = started(*CACHES["dynamic"], 3, 4)
    gm = captured(model, x, cache)
    longer = copy.deepcopy(cache)
    for layer in longer.layers:
        layer.update(torch.randn(2, HEADS, 3, WIDTH), torch.randn(2, HEADS, 3, WIDTH))
    assert accepts(gm, (x, longer), {}) and same(outcome(gm, x, longer), outcome(model, x, longer))
    longer.layers[1] = cache.layers[1]
    assert not accepts(gm, (x, longer), {})
    gm = captured(model, x, longer)
    assert same(outcome(gm, x, longer), outcome(model, x, longer))


def test_layers_whose_signature_names_a_type_with_arguments():
    """The annotations of a forward are an attribute of what stands in its place."""

    class Annotated(Attending):
        def forward(self, x, cache) -> tuple[torch.Tensor, None]:
            return super().forward(x, cache), None

    Annotated.forward.__annotations__["return"] = tuple[torch.Tensor, None]

    class Taking(Decoder):
        def forward(self, x, cache):
            for layer in self.layers:
                x, _ = layer(x, cache)
            return x

    model, x, cache = started(*CACHES["dynamic"], 3, 4)
    taking = Taking(0, own)
    taking.layers.extend(Annotated(number, own) for number in range(3))
    taking.load_state_dict(model.state_dict())
    gm = captured(taking, x, cache)
    assert len(list(block_calls(gm))) == 3 and same(outcome(gm, x, cache), outcome(model, x, cache))
