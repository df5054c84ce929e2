"""Programs: what is kept, and what makes room."""

import pytest
import torch
from graphs import adapted
from serving_models import Options

from lorafx.serving.programs import GuardFailed, ProgramCache, guarded


@pytest.mark.slow
def test_the_least_recently_used_make_room():
    lora, x = adapted(Options()), torch.randn(5, 4)
    lora._lorafx.dispatcher.programs.capacity = 2
    lora(x)
    lora(x, scale=torch.ones(3))
    lora(x)
    lora(x, power=2)
    explained = lora.explain()
    assert explained.dropped == 1 and [call.title.count("scale") for call in explained.calls] == [0, 0]


def test_a_cache_drops_the_keys_that_were_used_least_recently():
    cache = ProgramCache(capacity=3)
    for key, program in [("a", 1), ("b", 2), ("a", 3)]:
        cache.keep(key, program)
    assert cache.of("b") == (2,) and cache.of("c") == () and list(cache) == [1, 3, 2]
    cache.keep("c", 4)
    assert cache.of("a") == () and len(cache) == cache.dropped == 2
    cache.forget(2)
    assert cache.of("b") == () and list(cache) == [4]
    cache.clear()
    assert len(cache) == 0


def test_what_a_key_has_is_kept_whole():
    cache = ProgramCache(capacity=1)
    for program in range(3):
        cache.keep("a", program)
    assert cache.of("a") == (0, 1, 2) and cache.dropped == 0


def test_only_a_graphs_guards_are_refusals():
    def refuse(message):
        raise AssertionError(message)

    with pytest.raises(GuardFailed, match="size"):
        guarded(refuse, ["Guard failed: size"])
    with pytest.raises(AssertionError, match="the model's own") as caught:
        guarded(refuse, ["the model's own"])
    assert not isinstance(caught.value, GuardFailed) and guarded(max, [1, 2]) == 2
