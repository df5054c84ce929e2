"""Watched tensors: the thread that runs a model is told of functions that are given one, by whatever road."""

import contextlib
import copy
import pickle
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import lorafx
from lorafx.serving.per_site import SiteInterpreter
from lorafx.torch_private.tensors import function_modes
from lorafx.tree.hooks import RUNNING
from lorafx.tree.watched import can_be_watched, watched

pytestmark = pytest.mark.usefixtures("early")


class Told:
    """Writes down what it is told."""

    sees_all = False

    def __init__(self):
        self.names = []

    def told(self, func, types, args, kwargs):
        self.names.append(func.__name__)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


@pytest.fixture
def mode():
    RUNNING.mode = Told()
    yield RUNNING.mode
    RUNNING.mode = None


def test_functions_that_get_one_are_told_and_no_others(mode):
    layer, x = nn.Linear(3, 5), torch.randn(2, 3)
    weight, other = layer.weight, torch.randn(5, 3)
    with watched([weight]):
        assert isinstance(weight, nn.Parameter) and layer.weight is weight
        y = layer(x) + F.linear(x, other).relu()
        torch.cat([other, weight])
        torch.mul(other, other=weight)
    assert mode.names == ["linear", "cat", "mul"] and type(y) is torch.Tensor and type(weight) is nn.Parameter
    layer(x)
    assert len(mode.names) == 3


def test_in_other_threads_it_is_the_tensor_that_it_was(mode):
    layer, x, found = nn.Linear(3, 5), torch.randn(2, 3), []
    with watched([layer.weight]):
        thread = threading.Thread(target=lambda: found.append((layer(x), copy.deepcopy(layer.weight))))
        RUNNING.mode = None  # as a thread is that no forward has started
        thread.start()
        RUNNING.mode = mode
        thread.join()
    assert not mode.names
    torch.testing.assert_close(found[0][0], layer(x), rtol=0, atol=0)
    torch.testing.assert_close(found[0][1], layer.weight, rtol=0, atol=0)


def test_it_is_watched_until_the_last_one_is_done(mode):
    weight = nn.Parameter(torch.randn(3))
    with pytest.raises(ZeroDivisionError), watched([weight, weight]), watched([weight]):
        weight + (1 / 0)
    assert type(weight) is nn.Parameter
    outer, inner = watched([weight]), watched([weight])
    outer.__enter__(), inner.__enter__(), outer.__exit__(None, None, None)
    weight + 1
    assert mode.names == ["add"]
    inner.__exit__(None, None, None)
    assert type(weight) is nn.Parameter


@pytest.mark.parametrize("plain", [torch.Tensor, nn.Parameter])
def test_copies_of_one_are_plain(plain):
    """In another thread, which may save or copy the model meanwhile."""
    weight = plain(torch.randn(3))
    weight.mark = "kept"
    with watched([weight]):
        copies = copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), type(weight)(torch.ones(3))
    assert {type(each) for each in copies} == {plain}
    assert torch.equal(copies[0], weight) and torch.equal(copies[1], weight) and copies[1].mark == "kept"


def test_only_ordinary_tensors_can_be_watched():
    class Own(torch.Tensor):
        pass

    plain = torch.randn(2)
    assert can_be_watched([plain, nn.Parameter(plain)]) and not can_be_watched([plain, plain.as_subclass(Own)])
    seen = []
    torch.func.vmap(lambda each: (seen.append(can_be_watched([each])), each)[1])(plain)
    assert seen == [False]


# --- what an adapted model does with it ------------------------------------------------------------------------------


def adapted(model):
    return lorafx.compile(model, {"target_modules": ["layer"], "r": 2, "init_lora_weights": False}, capture="sites")


class Roads(nn.Module):
    """Reads its layer's weight by itself, and by another road for inputs whose first number is not negative."""

    def __init__(self, elsewhere):
        super().__init__()
        self.layer = nn.Linear(4, 6)
        self.elsewhere = elsewhere(self.layer)

    def forward(self, x):
        return self.layer(x) if x[0, 0] < 0 else self.elsewhere(x)


def by_attribute(layer):
    held = SimpleNamespace(layer=layer)
    return lambda x: F.linear(x, held.layer.weight, held.layer.bias)


def by_parameters(layer):
    tensors = list(layer.parameters())
    return lambda x: F.linear(x, *tensors)


def by_the_base(layer):
    return lambda x, base=[layer]: base[0](x)


@pytest.mark.parametrize("elsewhere", [by_attribute, by_parameters, by_the_base])
def test_a_road_that_no_call_before_has_gone_is_seen(elsewhere):
    """Which road it is depends on the data alone, so nothing that is known of a call before it says so."""
    lora = adapted(Roads(elsewhere))
    x = torch.randn(5, 4)
    x[0, 0] = -1
    expected = lora(x)
    for _ in range(2):
        torch.testing.assert_close(lora(x), expected)
    weight = lora.layer.weight + lora.layer.lora_B.default.weight @ lora.layer.lora_A.default.weight * 4
    for number in (1, -1, 1):
        x[0, 0] = number
        torch.testing.assert_close(lora(x), F.linear(x, weight, lora.layer.bias), rtol=1e-5, atol=1e-5)
    assert type(lora.layer.weight) is nn.Parameter


class Own(torch.Tensor):
    """A user's tensor whose functions give such tensors."""


class Careless(torch.Tensor):
    """A user's tensor that asks no other class."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class Doubling(TorchFunctionMode):
    """A user's mode that changes what a function gives."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        return y * 2 if func is F.linear else y


def by_own(layer):
    return lambda x: F.linear(x.as_subclass(Own), layer.weight)


def by_careless(layer):
    return lambda x: F.linear(x.as_subclass(Careless), layer.weight)


def by_no_class(layer):
    def read(x):
        with torch._C.DisableTorchFunctionSubclass():
            return F.linear(x, layer.weight)

    return read


def by_doubling(layer):
    def read(x):
        with Doubling():
            return F.linear(x, layer.weight)

    return read


@pytest.mark.parametrize("outside", [contextlib.nullcontext, Doubling])
@pytest.mark.parametrize("elsewhere", [by_own, by_careless, by_no_class, by_doubling])
def test_every_call_gives_what_the_first_gives(elsewhere, outside):
    lora = adapted(Roads(elsewhere))
    x = torch.ones(5, 4)
    with outside():
        results = [lora(x) for _ in range(4)]
    torch.testing.assert_close(results, results[:1] * 4, rtol=0, atol=0)
    assert {type(result) for result in results} == {Own if elsewhere is by_own else torch.Tensor}
    assert all(result.requires_grad for result in results)


def test_a_class_that_nobody_has_seen_before_keeps_its_say():
    lora = adapted(Roads(by_own))
    x = torch.full((5, 4), -1.0)
    for _ in range(3):
        lora(x)
    x[0, 0] = 1
    assert type(lora(x)) is Own and torch.equal(lora(x), lora(x))


@pytest.mark.parametrize("elsewhere", [by_attribute, None])
def test_what_another_thread_watches_gets_its_adapter_once(elsewhere):
    lora = adapted(Roads(elsewhere or by_attribute))
    x = torch.full((1, 4), 1.0 if elsewhere else -1.0)
    with watched(list(lora.parameters())):  # as another thread does
        results = [lora(x) for _ in range(4)]
    torch.testing.assert_close(results, [lora(x)] * 4, rtol=0, atol=0)


def test_a_model_within_another_of_the_same_base_has_its_own_adapter():
    class Both(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.layer, self.others = inner.layer, lambda x: inner(x)

        def forward(self, x):
            return self.layer(x) - self.others(x)

    base = Roads(by_attribute)
    inner = adapted(base)
    both = Both(inner)
    both.layer = base.layer
    lora, x = adapted(both), torch.ones(1, 4)
    a, b = lora.layer, inner.layer
    update = a.lora_B.default.weight @ a.lora_A.default.weight - b.lora_B.default.weight @ b.lora_A.default.weight
    for _ in range(4):
        torch.testing.assert_close(lora(x), x @ update.T * 4, rtol=1e-5, atol=1e-5)


def test_a_default_device_that_a_model_sets_stays():
    def read(layer):
        def forward(x):
            torch.set_default_device("cpu")
            return F.linear(x.as_subclass(Own), layer.weight)

        return forward

    lora = adapted(Roads(read))
    x = torch.full((5, 4), -1.0)
    for _ in range(3):
        lora(x)
    x[0, 0] = 1
    before = function_modes()
    try:
        lora(x)
        assert function_modes() == before + 1 and not isinstance(
            torch.overrides._get_current_function_mode(), SiteInterpreter
        )
    finally:
        torch.set_default_device(None)
    assert function_modes() == before


@pytest.fixture
def looked_at(monkeypatch):
    """Names of the functions that an interpreter sees because it looks at each."""
    names, see = [], SiteInterpreter.__torch_function__

    def seen(self, func, *rest):
        names.append(func.__name__)
        return see(self, func, *rest)

    monkeypatch.setattr(SiteInterpreter, "__torch_function__", seen)
    return names


def test_only_the_first_calls_of_a_kind_look_at_each_function(looked_at):
    lora = lorafx.compile(nn.Sequential(nn.Linear(3, 5), nn.ReLU()), {"target_modules": ["0"], "r": 2}, capture="sites")
    lora(torch.randn(2, 3))
    lora(torch.randn(2, 3))
    assert "relu" in looked_at
    looked_at.clear()
    lora(torch.randn(2, 3))
    assert not looked_at
