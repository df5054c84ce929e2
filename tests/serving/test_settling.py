"""Settling: what a model remembers from call to call, and what it prepares once."""

import pytest
import torch
from graphs import Chain, adapted
from serving_models import random, served, twins

import lorafx
from lorafx.errors import CaptureError
from lorafx.serving.attribute_guards import AttributeState
from lorafx.serving.call_key import CallKey
from lorafx.serving.programs import Program
from lorafx.serving.settling import Settling as Settled


class Stateful(Chain):
    """A model that remembers."""

    def __init__(self):
        super().__init__()
        self.last, self.history, self.counts = None, [], {"calls": 0}

    def forward(self, x, notes=None):
        h = super().forward(x)
        if self.last is not None:
            h = h + self.last
        self.last = h.detach()
        self.history.append(h.detach())
        self.counts["calls"] += 1
        self.loss = h.sum()
        return h * self.counts["calls"]


@pytest.mark.slow
def test_what_a_model_remembers_is_remembered():
    lora, plain = twins(Stateful())
    with pytest.warns(UserWarning, match="changes"):
        lora(torch.zeros(2, 4, dtype=torch.float64))
    plain(torch.zeros(2, 4, dtype=torch.float64))
    for x in (random(5, 4)[:2], random(2, 4), random(2, 4)):
        torch.testing.assert_close(lora(x), plain(x))
    assert lora.counts == {"calls": 4} and len(lora.history) == 4 and lora.loss.shape == ()
    assert all(type(h) is torch.Tensor for h in lora.history)
    assert served(lora) == ["sites", "sites"], "the second try said that it does so each time"


class Settling(Chain):
    """A model that prepares something once."""

    prepared = False

    def forward(self, x):
        if not self.prepared:
            self.prepared, self.offset = True, 2.0
        return super().forward(x) + self.offset


def test_what_a_model_settles_once_is_settled_by_its_own_python():
    lora, plain = twins(Settling())
    x = random(5, 4)
    with pytest.warns(UserWarning, match="changes"):
        torch.testing.assert_close(lora(x), plain(x))
    torch.testing.assert_close(lora(x), plain(x))
    assert lora.prepared and served(lora) == ["sites", "graph"]


@pytest.mark.slow
def test_a_capture_that_fails_leaves_the_models_containers_alone():
    model = Stateful()
    lora = adapted(model)
    with pytest.raises(CaptureError, match="changes"):
        lorafx.compile(Stateful(), {"target_modules": ["first"]}, capture="graph")(torch.randn(2, 4))
    with pytest.warns(UserWarning, match="changes"):
        lora(torch.randn(2, 4))
    assert len(lora.history) == 1 and type(lora.history[0]) is torch.Tensor


def test_a_kind_of_call_is_given_one_more_try():
    def program(attributes, **facts):
        return Program("", CallKey("", (), (), True, False, (), (), 0, (), frozenset(), attributes, ()), (), **facts)

    settling, states = Settled(), [AttributeState({"prepared": value}, ()) for value in (False, True)]
    assert settling.may_be_done(program(states[0], changes_model=True))
    assert not settling.may_be_done(program(states[1], changes_model=True)), "it does so each time"
    assert not Settled().may_be_done(program(states[0])), "it was refused for something else"
