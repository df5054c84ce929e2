"""Site policy: which calls and parts go by sites, and for what reason."""

import warnings

import pytest
import torch
from graphs import Chain, adapted
from modules import cases
from serving_models import random, served, twins
from torch import nn
from torch.utils.checkpoint import checkpoint

import lorafx
from lorafx.errors import CaptureError, UncoveredOperatorError
from lorafx.serving.attribute_guards import AttributeState
from lorafx.serving.call_key import CallKey
from lorafx.serving.site_policy import SitePolicy
from lorafx.serving.tree_state import TreeState


class Unrolled(nn.Module):
    """A recurrence in Python: a graph of it fits one length."""

    def __init__(self, by_size):
        super().__init__()
        self.cell, self.by_size = nn.Linear(4, 4), by_size

    def forward(self, x):
        h = torch.zeros_like(x[:, 0])
        for step in range(x.shape[1] if self.by_size else int(x.shape[1])):
            h = torch.tanh(self.cell(h) + x[:, step])
        return h


@pytest.mark.slow
def test_a_loop_over_a_size_runs_by_sites_at_once():
    lora, x = adapted(Unrolled(by_size=True)), torch.randn(2, 5, 4)
    with pytest.warns(UserWarning, match=r"loops over a size.*test_site_policy.py"):
        before = lora(x)
    lora(torch.randn(2, 7, 4))
    (call,) = lora.explain().calls
    assert call.served_by == "sites" and call.hits == 1
    config = {"target_modules": "all-linear", "r": 2, "lora_alpha": 6}
    unrolled = lorafx.compile(Unrolled(by_size=True), config, capture="graph")
    unrolled.load_state_dict(lora.state_dict())
    torch.testing.assert_close(unrolled(x), before)
    assert unrolled.explain().calls[0].served_by == "graph"


@pytest.mark.slow
def test_what_fits_one_size_gets_few_graphs_and_then_runs_by_sites():
    lora = adapted(Unrolled(by_size=False))
    merged = adapted(Unrolled(by_size=False))
    merged.load_state_dict(lora.state_dict())
    plain = merged.merge_and_unload()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for length in (2, 3, 4, 5, 6, 7, 8, 3):
            x = torch.randn(2, length, 4)
            torch.testing.assert_close(lora(x), plain(x))
    assert [call.served_by for call in lora.explain().calls] == ["graph"] * 4 + ["sites"]
    assert "4 were captured" in lora.explain().calls[-1].reason


class Region(Chain):
    """A model that runs a site in other modes than its own, or hands its weight out."""

    def __init__(self, way):
        super().__init__()
        self.way = way

    def forward(self, x):
        h = torch.relu(self.first(x))
        if self.way == "no_grad":
            with torch.no_grad():
                return self.second(h)
        if self.way == "autocast":
            with torch.autocast("cpu", enabled=False):
                return self.second(h)
        return self.second(h), self.second.weight


@pytest.mark.parametrize("way", cases(["no_grad", "autocast", "weight"], quick=["no_grad"]))
def test_a_site_in_a_region_of_its_own_acts(way):
    lora, plain = twins(Region(way))
    x = random(5, 4)
    with pytest.warns(UserWarning, match="site second"):
        ours = lora(x)
    ours, theirs = (output[0] if way == "weight" else output for output in (ours, plain(x)))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_hooks_on_inner_modules_are_called_each_time():
    lora, seen = adapted(Chain()), []
    before = lora(torch.ones(5, 4))
    handle = lora.first.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert torch.equal(lora(torch.ones(5, 4)), before) and torch.equal(lora(torch.ones(5, 4)), before)
    assert seen == [(5, 6)] * 2
    handle.remove()
    lora(torch.ones(5, 4))
    assert len(seen) == 2 and served(lora) == ["sites", "graph"]


def test_hooks_and_a_graph_that_is_asked_for_exclude_each_other():
    lora = lorafx.compile(Chain(), {"target_modules": "all-linear", "r": 2}, capture="graph")
    lora(torch.ones(5, 4))
    lora.first.register_forward_hook(lambda *_: None)
    with pytest.raises(CaptureError, match=r"hooks on first expect to be called\. With `capture=\"auto\"`"):
        lora(torch.ones(5, 4))


class Halves(nn.Module):
    """(n, 6) -> (n, 4): reads its weight in a way that only a graph of the layer shows, and runs a module inside."""

    def __init__(self):
        super().__init__()
        self.fc, self.inside = nn.Linear(6, 4), nn.Tanh()

    def forward(self, x):
        halves = self.fc.weight.split(2)
        return self.inside(torch.cat([torch.nn.functional.linear(x, half) for half in halves], -1))


def test_a_part_is_a_graph_of_its_own_unless_it_is_hooked_inside():
    lora, plain = twins(nn.Sequential(nn.Linear(3, 6), Halves()), target_modules=["0", "fc"])
    seen, x = [], random(5, 3)
    lora[0].register_forward_hook(lambda *_: seen.append("beside"))
    for _ in range(2):
        torch.testing.assert_close(lora(x), plain(x))
    assert seen == ["beside"] * 2 and "graph" in served(lora)
    lora[1].inside.register_forward_hook(lambda *_: seen.append("inside"))
    with pytest.raises(UncoveredOperatorError, match=r"1\.fc"):
        lora(x)


class InCheckpoint(nn.Module):
    """Branches on data, so that it goes by sites, around a layer that is checkpointed and needs a graph of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), Halves()

    def forward(self, x):
        h = checkpoint(lambda x: self.second(self.first(x)), x, use_reentrant=False)
        return h if x.sum() > 0 else -h


@pytest.mark.usefixtures("early")
def test_a_part_that_is_a_graph_of_its_own_is_one_again_in_backward():
    lora, plain = twins(InCheckpoint(), target_modules=["first", "fc"])
    for _ in range(2):
        x = random(5, 3).requires_grad_()
        y = x.detach().clone().requires_grad_()
        lora(x).sum().backward()
        plain(y).sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
    assert lora.second.fc.lora_B["default"].weight.grad.abs().sum() > 0


STATE = TreeState(0, AttributeState({}, ()), hooked=(), sharded=False)


@pytest.mark.parametrize(
    "capture, state, kept, reason",
    [
        ("auto", STATE, 0, ""),
        ("auto", STATE, 3, ""),
        ("auto", STATE, 4, "few sizes"),
        ("graph", STATE, 4, ""),
        ("sites", STATE, 0, "asked for"),
        ("auto", STATE._replace(hooked=("a",)), 0, "hooks"),
        ("graph", STATE._replace(sharded=True), 0, "sharded"),
    ],
)
def test_reasons_against_a_graph(capture, state, kept, reason):
    key = CallKey("", (), (), True, False, (), (), 0, (), frozenset(), state.attributes, ())
    found = SitePolicy(capture).reason_against_a_graph(key, state, kept)
    assert reason in found and bool(reason) == bool(found)


@pytest.mark.slow
def test_a_part_of_a_call_by_sites_goes_by_sites_when_it_is_called_alone():
    lora = adapted(nn.Sequential(Unrolled(by_size=True), nn.Linear(4, 4)), target_modules=["cell", "1"])
    with pytest.warns(UserWarning, match="loops over a size"):
        hidden = lora(torch.randn(2, 5, 4))
    lora[1](hidden)
    assert "part of a call" in lora.explain().calls[-1].reason
    lora.double()
    lora[1](hidden.double())
    assert served(lora)[-1] == "graph", "of a tree of other dtypes nothing is known"
