"""Watched tensors: the thread that runs a model is told of functions that are given one, by whatever road."""

import copy
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lorafx
from lorafx.serving.per_site import SiteInterpreter
from lorafx.tree.hooks import RUNNING
from lorafx.tree.watched import can_be_watched, watched

pytestmark = pytest.mark.usefixtures("early")


class Told:
    """Writes down what it is told."""

    sees_all = False

    def __init__(self):
        self.names = []

    def told(self, func, args, kwargs):
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
        thread.start()
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


def test_only_ordinary_tensors_can_be_watched():
    class Own(torch.Tensor):
        pass

    plain = torch.randn(2)
    assert can_be_watched([plain, nn.Parameter(plain)]) and not can_be_watched([plain, plain.as_subclass(Own)])
    seen = []
    torch.func.vmap(lambda each: (seen.append(can_be_watched([each])), each)[1])(plain)
    assert seen == [False]


# --- what an adapted model does with it ------------------------------------------------------------------------------


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
    lora = lorafx.compile(
        Roads(elsewhere), {"target_modules": ["layer"], "r": 2, "init_lora_weights": False}, capture="sites"
    )
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
