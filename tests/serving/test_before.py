"""Before: a call or part that is run once more, as a graph, changes what it changes once."""

import copy
import random
from collections import OrderedDict

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lorafx
from lorafx.serving import early_calls
from lorafx.serving.before import Touched


class Part(nn.Module):
    """(…, 6) -> (…, 3). Counts in a buffer, draws, and then reads its weight in a way that only a graph understands."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, seen):
        self.calls += 1
        seen.append(x * torch.rand(()))
        return seen[-1] @ self.lin.weight.T


class Counting(nn.Module):
    """Changes all that a model may hold, and calls a part."""

    of_class = 0

    def __init__(self):
        super().__init__()
        self.first, self.part = nn.Linear(4, 6), Part()
        self.number, self.list, self.dict, self.array = 0, [], OrderedDict(n=0), numpy.zeros(3)
        self.tensor, self.random, self.drawn = torch.zeros(2), random.Random(0), ()
        self.register_buffer("in_place", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(2))

    def forward(self, x, seen):
        self.number += 1
        Counting.of_class += 1
        self.list.append(self.number)
        self.dict["n"] += 1
        self.array[0] += 1
        self.tensor += 1
        self.in_place += 1
        self.replaced = self.replaced + 1
        self.drawn = self.random.random(), random.random(), numpy.random.rand(), float(torch.rand(()))
        return self.part(self.first(x), seen)

    def state(self):
        tensors = [float(t.sum()) for t in (self.tensor, self.in_place, self.replaced, self.part.calls)]
        held = self.number, self.of_class, len(self.list), self.dict["n"], self.array[0], self.drawn
        return [*held, *tensors, float(torch.rand(()))]


class Drawing(Counting):
    """Reads a weight oddly itself, after nothing that a graph would refuse."""

    def forward(self, x, seen):
        self.in_place += 1
        self.replaced = self.replaced + 1
        seen.append(self.first(x) * torch.rand(()))
        return seen[-1] @ self.part.lin.weight.T


@pytest.mark.parametrize("how", ["early", "sites", "a graph that fails"])
@pytest.mark.parametrize("kind", [Counting, Drawing])
def test_what_a_call_changes_is_changed_once(kind, how, monkeypatch):
    if kind is Drawing and how == "sites":
        pytest.skip("nothing but a graph of the whole understands it")
    monkeypatch.setattr(early_calls, "REPEATS", 5 if how == "early" else 0)
    base, x, found = kind(), torch.ones(5, 4), []
    config = {"r": 2, "target_modules": "all-linear"}
    capture = "sites" if how == "sites" else "auto"
    plain = kind()
    plain.load_state_dict(base.state_dict())
    for model in (plain, lorafx.compile(base, config, capture=capture)):
        Counting.of_class, states = 0, []
        for seed in range(2):
            for seeded in (random.seed, numpy.random.seed, torch.manual_seed):
                seeded(seed)
            seen = []
            y = model(x, seen)
            states.append((model.state(), len(seen), y.sum().item()))
        found.append(states)
    for expected, came in zip(*found):
        assert came[:2] == expected[:2] and came[2] == pytest.approx(expected[2], rel=1e-5)


def test_a_part_that_fails_otherwise_is_not_run_again():
    class Failing(Part):
        def forward(self, x):
            self.calls += 1
            raise ValueError("no")

    lora = lorafx.compile(nn.Sequential(nn.Linear(4, 6), Failing()), {"r": 2, "target_modules": "all-linear"})
    with pytest.raises(ValueError, match="no"):
        lora(torch.ones(5, 4))
    assert float(lora[1].calls) == 1


class Odd(nn.Module):
    """(…, 4) -> (…, 3). Its second layer's weight is read in a way that only a graph understands."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.ran = nn.Sequential(nn.Linear(4, 6)), Reading(), 0

    def forward(self, x):
        self.ran += 1
        return self.second(self.first(x))


class Reading(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 3)

    def forward(self, x):
        return torch.cat([F.linear(x, rows) for rows in (self.lin.weight[:1], self.lin.weight[1:])], -1)


@pytest.mark.parametrize("model", [nn.Sequential, Odd])
def test_parts_take_no_note_before_one_has_needed_a_graph(model, monkeypatch):
    notes, of = [], Touched.of
    monkeypatch.setattr(Touched, "of", lambda module, *given: notes.append(type(module)) or of(module, *given))
    base = Odd() if model is Odd else nn.Sequential(nn.Sequential(nn.Linear(4, 6)), nn.Linear(6, 3))
    lora, x = lorafx.compile(base, {"r": 2, "target_modules": "all-linear"}, capture="sites"), torch.ones(5, 4)
    lora(x)
    assert notes == ([nn.Sequential] if model is Odd else [])
    for _ in range(2):
        lora(x)
    assert model is not Odd or lora.ran == 3


def test_a_part_with_somebodys_hooks_is_not_called_twice():
    """What a hook has begun before a part would be left half done, were the call to start anew."""
    config = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}
    lora, x = lorafx.compile(Odd(), config, capture="sites"), torch.ones(5, 4)
    expected = copy.deepcopy(lora).merge_and_unload()(x)
    begun = []
    lora.second.register_forward_pre_hook(lambda module, args: begun.append(module))
    torch.testing.assert_close(lora(x), expected)
    assert begun == [lora.second] and lora.ran == 1
