"""purity: what prints, draws random numbers or changes the model is no call that a graph can serve."""

from __future__ import annotations

import random
import threading
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch import nn

from lorafx.capture.purity import Changed, pure, unchanging
from lorafx.errors import CaptureError


def test_what_prints_is_refused_by_its_line_and_not_shown(capsys):
    with pytest.raises(CaptureError, match=r"it prints, .*test_purity\.py:\d+: print\(.seen.\)"), pure():
        print("seen")
    assert capsys.readouterr().out == ""


def test_other_threads_print_to_the_screen(capsys):
    with pure():
        thread = threading.Thread(target=print, args=("from elsewhere",))
        thread.start()
        thread.join()
    assert capsys.readouterr().out == "from elsewhere\n"


@pytest.mark.parametrize("draw", [random.random, numpy.random.rand], ids=["Python", "numpy"])
def test_random_numbers_are_refused_and_come_again(draw):
    random.seed(0)
    numpy.random.seed(0)
    expected = draw()
    random.seed(0)
    numpy.random.seed(0)
    with pytest.raises(CaptureError, match="random numbers from Python or numpy"), pure():
        draw()
    assert draw() == expected


def test_what_computes_and_draws_from_torch_is_let_through():
    with pure():
        torch.rand(2)


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.count, self.seen, self.notes = 0, {"last": []}, None
        self.register_buffer("mean", torch.zeros(1))


def count(model):
    model.count += 1


def add(model):
    model.seen["last"].append(1)


def new(model):
    model.extra = 1


def forget(model):
    del model.notes


@pytest.mark.parametrize(("act", "name"), [(count, "0.count"), (add, "0.seen"), (new, "0.extra"), (forget, "0.notes")])
def test_a_change_of_the_model_is_refused_by_its_name(act, name):
    model = nn.Sequential(Remembers())
    with pytest.raises(Changed, match=f"it changes {name} of the model"), unchanging(model):
        act(model[0])


def test_buffers_may_be_written_to():
    model = Remembers()
    with unchanging(model):
        model.mean.add_(1)


def test_what_a_refused_call_has_changed_is_put_back():
    model = nn.Sequential(Remembers())
    model[0].state, model[0].seen["deep"] = SimpleNamespace(calls=0, log=[1]), [SimpleNamespace(calls=0)]
    with pytest.raises(Changed), unchanging(model):
        model[0].state.calls += 1
        model[0].state.log.append(2)
        model[0].seen["deep"][0].calls += 1
    assert model[0].state == SimpleNamespace(calls=0, log=[1]) and model[0].seen["deep"] == [SimpleNamespace(calls=0)]


@pytest.mark.parametrize("draw", [random.Random(0), numpy.random.default_rng(0)], ids=["Python", "numpy"])
def test_a_models_own_source_of_random_numbers_is_refused(draw):
    model = nn.Sequential(Remembers())
    model[0].draw = draw
    with pytest.raises(Changed, match=r"it changes 0\.draw"), unchanging(model):
        draw.random()


def test_what_only_objects_hold_may_have_been_noted_for_good():
    model = nn.Sequential(Remembers())
    model[0].state = SimpleNamespace(kind=None)
    with pytest.raises(Changed, match=r"0\.state\.kind") as caught, unchanging(model):
        model[0].state.kind = "found"
    assert model[0].state.kind == "found"
    caught.value.put_back()
    assert model[0].state.kind is None
