"""holdings: what a value holds is found at any depth, by whatever it is held, and can be put back."""

import dataclasses
import functools
import logging
import random
import threading
from collections import OrderedDict, deque, namedtuple
from contextvars import ContextVar
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch import nn

from lorafx.tree.holdings import LARGE, all_holdings, holdings, is_library, same, snapshot

SETTING = [1.5]
Pair = namedtuple("Pair", "a")


@dataclasses.dataclass
class Data:
    a: object


class Slotted:
    __slots__ = ("a",)

    def __init__(self, a):
        self.a = a


class Both(Slotted):
    """Has a slot and attributes."""


def closure(a):
    return lambda: a


def default(a):
    return lambda x=a: x


def method(a):
    return SimpleNamespace(a=a, f=Data.__init__).f.__get__(Data(a))


HELD_BY = {
    "list": lambda a: [a],
    "tuple": lambda a: (a,),
    "dict": lambda a: {"a": a},
    "an ordered dict": lambda a: OrderedDict(a=a),
    "a deque": lambda a: deque([a]),
    "a set": lambda a: {a},
    "a named tuple": Pair,
    "a namespace": lambda a: SimpleNamespace(a=a),
    "a dataclass": Data,
    "a slot": Slotted,
    "an attribute beside slots": lambda a: (both := Both(1), setattr(both, "b", a))[0],
    "a variable": closure,
    "a default": default,
    "a partial": lambda a: functools.partial(max, a),
    "a partial's keyword": lambda a: functools.partial(max, key=a),
    "a bound method": method,
    "a property": lambda a: property(closure(a)),
    "a static method": lambda a: staticmethod(closure(a)),
    "a class": lambda a: type("Settings", (), {"a": a, "__module__": __name__}),
    "a variable of a context": lambda a: ContextVar("a", default=a),
    "a thread's own": lambda a: (local := threading.local(), setattr(local, "a", a))[0],
    "nine lists": lambda a: functools.reduce(lambda inside, _: [inside], range(9), a),
}


@pytest.mark.parametrize("how", HELD_BY)
def test_what_holds_a_value_is_found(how):
    thing = object()
    assert any(value is thing for holding in all_holdings([HELD_BY[how](thing)]) for value in holding.values())


def test_functions_hold_the_globals_that_they_name():
    def reads():
        return SETTING

    held = [value for holding in holdings(reads) for value in holding.values()]
    assert any(value is SETTING for value in held) and not any(value is pytest for value in held)
    assert holdings(torch.nn.functional.linear) == [] or not is_library(__name__)


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(2),
        nn.Linear(2, 3),
        nn.Linear,
        tuple[torch.Tensor, int],
        torch,
        3,
        "text",
        torch.optim.SGD([torch.ones(1)]),
        logging.getLogger(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_tensors_modules_and_machinery_are_not_looked_into(value):
    assert holdings(value) == []


def test_long_containers_and_objects_set_apart_are_not_looked_into():
    assert holdings(list(range(LARGE + 1))) == []
    thing = Data([3])
    assert [h.of for h in all_holdings([thing], apart={id(thing)})] == []


@pytest.mark.parametrize(
    "value, change",
    [
        (numpy.ones(3), lambda value: value.fill(2)),
        (random.Random(0), lambda value: value.random()),
        (numpy.random.default_rng(0), lambda value: value.random()),
        (numpy.random.RandomState(0), lambda value: value.rand()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_of_arrays_and_random_numbers_the_state_counts(value, change):
    def held():
        return [inside for holding in all_holdings([value]) for inside in holding.values()]

    before = held()
    assert same(before, held())
    change(value)
    assert not same(before, held())
    assert holdings(numpy.ones(2**17)) == []


def test_a_circle_is_walked_once():
    ring = [Data(None)]
    ring[0].a = ring
    assert len(list(all_holdings([ring]))) == 2


def change(value):
    """Something else in the place of what is held."""
    if isinstance(value, dict):
        value["a"] = value["b"] = 2
    elif isinstance(value, (list, deque)):
        value.append(2)
        value[0] = 2
    elif isinstance(value, set):
        value.clear()
    elif callable(value):
        value.__closure__[0].cell_contents = 2
    else:
        value.a = 2


@pytest.mark.parametrize("how", [h for h in HELD_BY if "tuple" not in h and h not in ("nine lists", "a default")][:10])
def test_a_snapshot_puts_everything_back(how):
    thing = torch.ones(2)  # its comparison with another would be a tensor
    value = HELD_BY[how](thing)
    before = [list(holding.values()) for holding in all_holdings([value])]
    put_back = snapshot([[value]])
    change(value)
    assert not all(map(same, before, [list(h.values()) for h in all_holdings([value])]))
    put_back()
    assert all(map(same, before, [list(h.values()) for h in all_holdings([value])]))
