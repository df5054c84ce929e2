"""loops: a loop over a size is refused, and a module that had one is not captured up to it again."""

import sys
import warnings

import pytest
import torch
from graphs import adapted
from torch import nn

from lorafx.capture import frames, loops
from lorafx.capture.export import trace_part
from lorafx.capture.loops import Looping, Loops
from lorafx.errors import CaptureError
from lorafx.serving import early_calls


class Scan(nn.Module):
    """A loop over a size, or over a number, of tokens that are (rows, tokens, 5)."""

    def __init__(self, steps=None):
        super().__init__()
        self.cell, self.steps = nn.Linear(5, 5), steps

    def forward(self, x, bias=None):
        h = torch.zeros_like(x[:, 0])
        for step in range(x.shape[1] if self.steps is None else self.steps):
            h = torch.tanh(self.cell(h) + x[:, step])
        return h if bias is None else h + bias


class Scanning(nn.Module):
    """(rows, tokens, 3) -> (rows, 2), by a scan that it goes around where it is told to, and with a loss at the end."""

    def __init__(self, steps=None):
        super().__init__()
        self.up, self.scan, self.down = nn.Linear(3, 5), Scan(steps), nn.Linear(5, 2)

    def forward(self, x, labels=None, around=False):
        h = self.up(x)
        y = self.down(h.sum(1) if around else self.scan(h))
        return y if labels is None else (y - labels).square().mean()


def captured(model, found, *shape, **kwargs):
    return trace_part(model, "", (torch.randn(*shape, 3),), kwargs, loops=found)


@pytest.fixture
def runs(monkeypatch):
    """The modules that ran into a loop: what is remembered does not get there."""
    ran = []

    def running_module():
        ran.append(found := frames.running_module())
        return found

    monkeypatch.setattr(loops, "running_module", running_module)
    return ran


def test_a_loop_over_a_size_is_refused_by_its_line_once_and_then_at_its_module(runs):
    model, found = Scanning(), Loops()
    messages = []
    for more in ({}, {"labels": torch.randn(4, 2)}):
        with pytest.raises(CaptureError, match=r"loops over a size.*test_loops\.py:\d+: for step in range") as raised:
            captured(model, found, 4, 6, **more)
        messages.append(str(raised.value))
        assert isinstance(raised.value.__cause__, Looping)
    assert len(runs) == 1 and len(set(messages)) == 1


def test_what_loops_no_more_or_does_not_get_there_is_a_graph(runs):
    model, found = Scanning(), Loops()
    with pytest.raises(CaptureError):
        captured(model, found, 4, 6)
    for x, more in ((torch.randn(4, 1, 3), {}), (torch.randn(7, 5, 3), {"around": True})):
        torch.testing.assert_close(captured(model, found, *x.shape[:2], **more)(x, **more), model(x, **more))
    assert len(runs) == 1


def test_a_loop_over_a_number_is_a_graph_and_range_comes_back():
    model, found, x = Scanning(steps=2), Loops(), torch.randn(5, 8, 3)
    torch.testing.assert_close(captured(model, found, 4, 6)(x), model(x))
    assert "range" not in vars(sys.modules[__name__])


def test_a_model_that_loops_itself_is_remembered_by_what_it_is_given(runs):
    model, found = Scan(), Loops()
    for kwargs in ({}, {"bias": torch.ones(5)}):
        with pytest.raises(CaptureError, match="loops over a size"):
            trace_part(model, "", (torch.randn(4, 6, 5),), kwargs, loops=found)
    assert len(runs) == 1
    with pytest.raises(CaptureError, match="loops over a size"):
        trace_part(model, "", (torch.randn(1, 6, 5),), {}, loops=found)
    assert len(runs) == 2, "for one row it might not loop"


def test_kinds_of_calls_of_one_model_run_into_its_loop_once(runs, monkeypatch):
    monkeypatch.setattr(early_calls, "REPEATS", 0)
    lora, x = adapted(Scanning()), torch.randn(4, 6, 3)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        lora(x), lora(x, torch.randn(4, 2)), lora.eval()(x), lora(x[:, :1]), lora(x, around=True)
    assert len(seen) == 1 and len(runs) == 1
    assert [call.served_by for call in lora.explain().calls] == ["sites"] * 3 + ["graph"] * 2
    assert all("loops over a size" in call.reason for call in lora.explain().calls[:3])
