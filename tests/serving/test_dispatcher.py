"""Dispatch: calls of one kind share a graph, the oldest make room, and explain() says what happened and why."""

import warnings

import pytest
import torch
from graphs import Chain, adapted
from torch import nn

import lorafx
from lorafx.serving.tree_state import Layout


class Options(Chain):
    """A model with arguments of many sorts."""

    def forward(self, x, scale=None, power=1, shift=0, extra=None):
        y = super().forward(x) ** power + shift
        y = y if scale is None else y * scale
        return {"y": y, "extra": extra}


def whys(lora):
    return [call.why for call in lora.explain().calls]


def test_sizes_order_of_keywords_and_defaults_share_a_graph():
    lora = adapted(Options())
    lora(torch.randn(5, 4), scale=torch.ones(3), extra=None)
    lora(torch.randn(7, 4), extra=None, scale=torch.ones(3))
    lora(torch.randn(2, 4), scale=torch.ones(3))
    (call,) = lora.explain().calls
    assert call.hits == 2 and call.why == "the first call" and call.served_by == "graph"


def test_it_says_in_what_a_call_differed():
    lora, x = adapted(Options()), torch.randn(5, 4)
    lora(x)
    lora(x, scale=torch.ones(3))
    lora(torch.randn(1, 4))
    with torch.no_grad():
        lora(x)
    lora.eval()(x)
    assert whys(lora) == [
        "the first call",
        "scale: not given → (n) float32 on cpu",
        "x: (n, n) float32 on cpu → (1, n) float32 on cpu",
        "grad: True → False",
        "the model's modes (train or eval), dtypes, devices, hooks or modules",
    ]
    assert "captured because of" in str(lora.explain())


def test_an_integer_that_changes_is_no_longer_a_constant():
    lora, x = adapted(Options()), torch.randn(5, 4)
    base = lora._lorafx.base
    with lora.disable_adapter():
        for shift in (7, 8, 9, 10, 11):
            assert torch.equal(lora(x, shift=shift)["y"], base(x, shift=shift)["y"])
    assert len(lora.explain().calls) == 2, "7 as a constant, then any number"
    assert "shift: 7 → any" in whys(lora)[1]


def test_a_constant_that_keeps_changing_is_named_once():
    lora, x = adapted(Options()), torch.randn(5, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(8):
            lora(x, scale=0.5 + step / 10)
    messages = [str(w.message) for w in caught if "values so far" in str(w.message)]
    assert len(messages) == 1 and "argument scale" in messages[0]


def test_the_least_recently_used_make_room():
    lora, x = adapted(Options()), torch.randn(5, 4)
    lora._lorafx.dispatcher.capacity = 2
    lora._lorafx.dispatcher.clear()
    lora(x)
    lora(x, scale=torch.ones(3))
    lora(x)
    lora(x, power=2)
    explained = lora.explain()
    assert explained.dropped == 1 and [call.title.count("scale") for call in explained.calls] == [0, 0]


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


def test_a_loop_over_a_size_runs_by_sites_at_once():
    lora, x = adapted(Unrolled(by_size=True)), torch.randn(2, 5, 4)
    with pytest.warns(UserWarning, match=r"loops over a size.*test_dispatcher.py"):
        before = lora(x)
    lora(torch.randn(2, 7, 4))
    (call,) = lora.explain().calls
    assert call.served_by == "sites" and call.hits == 1
    config = {"target_modules": "all-linear", "r": 2, "lora_alpha": 6}
    unrolled = lorafx.compile(Unrolled(by_size=True), config, capture="graph")
    unrolled.load_state_dict(lora.state_dict())
    torch.testing.assert_close(unrolled(x), before)
    assert unrolled.explain().calls[0].served_by == "graph"


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


def test_what_changes_in_the_tree_is_seen():
    lora, x = adapted(Chain()), torch.randn(5, 4)
    lora(x)
    lora.second.eval()
    lora(x)
    lora.double()
    assert lora(x.double()).dtype == torch.float64
    lora.second.weight.requires_grad_(False)
    number = len(lora.explain().calls)
    lora.train()
    lora.float()
    lora(x)
    assert number == 3 and len(lora.explain().calls) == 3 and lora.explain().calls[-1].hits == 1


@pytest.mark.parametrize("value", [True, "mean", 2.5, (1, 2)])
def test_constants_are_told_apart(value):
    class Echo(Chain):
        def forward(self, x, option=None):
            return super().forward(x), option

    lora, x = adapted(Echo()), torch.randn(5, 4)
    assert lora(x, option=value)[1] == value and lora(x)[1] is None and lora(x, option=value)[1] == value
    assert len(lora.explain().calls) == 2


class Listing(dict):
    """A dict whose values come as a list, as they were when asked for."""

    def values(self):
        return list(super().values())


@pytest.mark.parametrize("kind", [dict, Listing])
def test_a_setting_within_a_container_is_no_constant(kind):
    class Scaled(Chain):
        def forward(self, x):
            return super().forward(x) * self.settings["scale"]

    base = Scaled()
    base.settings = kind(scale=1.0)
    lora, x = adapted(base), torch.randn(5, 4)
    once = lora(x)
    lora.settings["scale"] = 3.0
    torch.testing.assert_close(lora(x), once * 3)


def test_a_module_on_another_device_is_another_layout():
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(9)))
    layout, seen = Layout(), set()
    for moved in range(9):
        seen.add(layout.number(model).layout)
        model[moved].to("meta")
    assert len(seen) == 9
