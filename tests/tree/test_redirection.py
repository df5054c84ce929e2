"""redirection: whatever a mirror holds leads to the mirror's modules, and what leads nowhere stays the same object."""

import functools
import weakref
from collections import OrderedDict, defaultdict, deque, namedtuple
from types import MethodType, SimpleNamespace

import pytest
from torch import nn

from lorafx.tree.redirection import Redirection

Pair = namedtuple("Pair", "first second")


class Owner:
    __slots__ = ("module",)

    def __init__(self, module):
        self.module = module


class Stubborn:
    """Refuses to be copied."""

    def __init__(self, module):
        self.module = module

    def __copy__(self):
        raise TypeError("there is one of me")


def recursive(module):
    def call(depth):
        return call(depth - 1) if depth else module

    return call


def wrapped(module):
    @functools.wraps(module.forward)
    def call():
        return module

    return call


ROADS = {  # how it is held, and how it is found
    "itself": (lambda m: m, lambda h: h),
    "a list": (lambda m: [1, m], lambda h: h[1]),
    "a tuple": (lambda m: (m,), lambda h: h[0]),
    "a named tuple": (lambda m: Pair(m, 1), lambda h: h.first),
    "a set": (lambda m: {m}, lambda h: next(iter(h))),
    "a dict": (lambda m: {"a": m}, lambda h: h["a"]),
    "an ordered dict": (lambda m: OrderedDict(a=m), lambda h: h["a"]),
    "a dict with defaults": (lambda m: defaultdict(list, a=m), lambda h: h["a"]),
    "a deque": (lambda m: deque([m], maxlen=3), lambda h: h[0]),
    "a namespace": (lambda m: SimpleNamespace(m=m), lambda h: h.m),
    "a slot": (Owner, lambda h: h.module),
    "a weak reference": (weakref.ref, lambda h: h()),
    "a bound method": (lambda m: m.forward, lambda h: h.__self__),
    "a method put on": (lambda m: MethodType(lambda self: self, m), lambda h: h()),
    "a variable": (lambda m: lambda: m, lambda h: h()),
    "a default": (lambda m: lambda x=m: x, lambda h: h()),
    "a keyword's default": (lambda m: lambda *, x=m: x, lambda h: h()),
    "a partial": (lambda m: functools.partial(lambda x: x, m), lambda h: h()),
    "a partial's keyword": (lambda m: functools.partial(lambda x: x, x=m), lambda h: h()),
    "a function that calls itself": (recursive, lambda h: h(3)),
    "what a function wraps": (wrapped, lambda h: h.__wrapped__.__self__),
    "a function that wraps": (wrapped, lambda h: h()),
    "all of it": (lambda m: {"a": [SimpleNamespace(f=functools.partial(lambda x: x, m))]}, lambda h: h["a"][0].f()),
}


@pytest.mark.parametrize("road", ROADS)
def test_every_road_leads_to_the_twin(road):
    hold, find = ROADS[road]
    module, twin = nn.Linear(2, 3), nn.Linear(2, 3)
    held = hold(module)
    other = Redirection({id(module): twin}, [held])(held)
    assert find(other) is twin and find(held) is module and type(other) is type(held)


@pytest.mark.parametrize("road", [road for road in ROADS if road != "itself"])
def test_what_leads_to_no_original_stays_the_same(road):
    module = nn.Linear(2, 3)
    held = ROADS[road][0](module)
    assert Redirection({id(nn.Linear(2, 3)): nn.Linear(2, 3)}, [held])(held) is held


def test_what_is_shared_stays_shared_and_circles_close():
    module, twin = nn.Linear(2, 3), nn.Linear(2, 3)
    ring = SimpleNamespace(module=module)
    ring.again, plain = [ring], [1]
    values = [ring, [ring, plain], plain]
    redirect = Redirection({id(module): twin}, values)
    first, second, third = map(redirect, values)
    assert first is second[0] is first.again[0] and first.module is twin and first is not ring
    assert second[1] is third is plain


def test_what_refuses_to_be_copied_is_left():
    module = nn.Linear(2, 3)
    held = Stubborn(module)
    assert Redirection({id(module): nn.Linear(2, 3)}, [held])(held) is held


def test_a_redirected_function_is_otherwise_the_same():
    module, twin = nn.Linear(2, 3), nn.Linear(2, 3)
    counter = [0]

    def count(step: int, *, by: int = 2) -> nn.Module:
        """Counts."""
        counter[0] += step * by
        return module

    other = Redirection({id(module): twin}, [count])(count)
    assert other(1) is twin and other(1, by=5) is twin and counter == [7], "a variable without modules is shared"
    assert (other.__doc__, other.__name__, other.__module__) == ("Counts.", "count", count.__module__)
    assert other.__annotations__ == count.__annotations__ and not hasattr(other, "__wrapped__")
