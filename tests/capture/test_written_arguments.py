"""What a graph has filled goes into the caller's own containers, whatever they hold more or less than before."""

from collections import deque
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers import DynamicCache

import lorafx
from lorafx.capture.caches import register_caches
from lorafx.capture.written_arguments import fill

register_caches(nn.Module())


def cache(layers, length=3):
    made = DynamicCache()
    for layer in range(layers):
        made.update(torch.randn(1, 2, length, 4), torch.randn(1, 2, length, 4), layer)
    return made


def filled(output, containers, **own):
    """What `fill` gives where a graph gives this output and containers, to a caller with these of his own."""
    leaves, spec = pytree.tree_flatten((output, containers))
    return fill(leaves, spec, (), own)


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 2), (1, 3), (3, 1)])
def test_a_cache_keeps_its_objects_and_gets_the_contents(before, after):
    own, new = cache(before), cache(after, length=5)
    kept = list(own.layers)
    for layer in kept:
        layer.surplus = torch.ones(1)
    output = filled(("lorafx: the argument past", torch.zeros(1)), {"past": new}, past=own)
    assert output[0] is own and len(own.layers) == after
    for mine, given in zip(own.layers, new.layers):
        assert mine.keys is given.keys and mine.values is given.values and vars(mine).keys() == vars(given).keys()
    assert all(mine is old for mine, old in zip(own.layers, kept))


def test_containers_within_are_the_callers_too():
    inner, own = {"kept": 1, "gone": 2}, [cache(1), "text"]
    notes = {"inner": inner, "list": own}
    new = {"inner": {"kept": 3, "added": 4}, "list": [cache(1), 5, (6, [7])]}
    output = filled({"loss": 0, "notes": "lorafx: the argument notes"}, {"notes": new}, notes=notes)
    assert output == {"loss": 0, "notes": notes} and output["notes"] is notes
    assert notes["inner"] is inner == {"kept": 3, "added": 4}
    assert notes["list"] is own and own[1:] == [5, (6, [7])] and own[0].layers[0].keys is new["list"][0].layers[0].keys


class Pair(NamedTuple):
    first: list
    second: object


def test_what_a_tuple_or_a_deque_holds_is_filled():
    inner, own = [1], deque([5, 6], maxlen=3)
    notes = {"tuple": (inner, "kept"), "pair": Pair(kept := [2], 3), "last": own, "longer": (4,), "of": torch.Size([2])}
    before = notes["tuple"]
    new = {"tuple": ([1, 2], "kept"), "pair": Pair([2, 3], 4), "last": deque([6, 7, 8], maxlen=3), "longer": (4, [5])}
    new["of"] = torch.Size([300])
    filled({"loss": 0}, {"notes": new}, notes=notes)
    assert notes["tuple"] is before and inner == [1, 2]
    assert type(notes["pair"]) is Pair and notes["pair"].first is kept == [2, 3] and notes["pair"].second == 4
    assert notes["last"] is own and list(own) == [6, 7, 8]
    assert notes["longer"] == (4, [5]) and notes["of"] == torch.Size([300])


class Remembers(nn.Module):
    """Keeps what it was given in containers of its caller's."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, states, past):
        states[0].append(x * 2)
        past.append(x * 3)
        return self.layer(x)


@pytest.mark.parametrize("capture", ["graph", "sites"])
def test_a_model_fills_lists_in_tuples_and_deques(capture):
    model = lorafx.compile(Remembers(), {"target_modules": ["layer"]}, capture=capture)
    x, states, past = torch.randn(2, 4), ([], "name"), deque(maxlen=2)
    for count in (1, 2, 3):
        model(x + count, states, past)
        assert len(states[0]) == count and len(past) == min(count, 2)
        assert torch.equal(states[0][-1], (x + count) * 2) and torch.equal(past[-1], (x + count) * 3)
    assert torch.equal(past[0], (x + 2) * 3)
