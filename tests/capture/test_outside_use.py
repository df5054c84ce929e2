"""What a model takes from outside, or does there, is frozen by no graph: such calls go by sites, as the reason says."""

from __future__ import annotations

import cProfile
import datetime
import functools
import gc
import io
import itertools
import logging
import os
import pathlib
import random
import sys
import time
import uuid
import warnings

import numpy
import pytest
import torch
from torch import nn

import lorafx
from lorafx.capture.export import trace
from lorafx.errors import CaptureError

FILE, LOG = pathlib.Path(__file__), logging.getLogger(__name__)
OPENED, COUNT = FILE.open(), itertools.count()
NUMBERS, STEPS = iter(range(10**6)), (step for step in range(10**6))
USES = {
    "time": (time.time, "reads a clock"),
    "perf_counter": (time.perf_counter, "reads a clock"),
    "datetime": (lambda: datetime.datetime.now().microsecond, "reads a clock"),
    "open": (lambda: open(FILE).close(), "reads or writes files"),
    "pathlib": (lambda: len(FILE.read_text()), "reads or writes files"),
    "stat": (lambda: os.path.getmtime(FILE), "reads or writes files"),
    "held open": (lambda: len(OPENED.read(1)), "reads or writes files"),
    "log": (lambda: LOG.error("seen"), "logs a message"),
    "stderr": (lambda: sys.stderr.write("seen"), "reads or writes files"),
    "print to stderr": (lambda: print("seen", file=sys.stderr), "prints"),
    "fresh random": (lambda: random.Random(1).random(), "random numbers that are not of torch's own"),
    "fresh numpy": (lambda: numpy.random.default_rng().normal(), "random numbers that are not of torch's own"),
    "uuid": (lambda: uuid.uuid4().int % 7, "random numbers that are not of torch's own"),
    "seed": (lambda: torch.manual_seed(1), "seeds"),
    "initial seed": (torch.initial_seed, "seeds"),
    "generator": (lambda: torch.rand((), generator=torch.Generator().manual_seed(3)), "names a generator"),
    "count": (lambda: next(COUNT), "changes use"),
    "iterator": (lambda: next(NUMBERS), "changes use"),
    "steps": (lambda: next(STEPS), "changes use"),
}


class Uses(nn.Module):
    """(…, 4) -> (…, 5): adds what something from outside gives, if that is a number or a tensor."""

    def __init__(self, use):
        super().__init__()
        self.lin, self.use = nn.Linear(4, 5), use

    def forward(self, x):
        value = self.use()
        return self.lin(x) + value if isinstance(value, (int, float, torch.Tensor)) else self.lin(x)


@pytest.mark.parametrize("use", USES)
def test_what_is_of_outside_is_in_no_graph(use):
    function, reason = USES[use]
    with pytest.raises(CaptureError, match=reason) as raised:
        trace(Uses(function), torch.randn(2, 4))
    assert "changes use" in reason or f"[{__file__}:" in str(raised.value)  # the line is the model's, not the library's


@pytest.mark.usefixtures("early")
def test_a_model_with_a_clock_goes_on_reading_it():
    lora, x = lorafx.compile(Uses(time.perf_counter), {"r": 2, "target_modules": ["lin"]}).double(), torch.zeros(2, 4)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        seen = [lora(x.double())[0, 0].item() for _ in range(6)]
    assert seen == sorted(set(seen))
    assert {call.served_by for call in lora.explain().calls} == {"sites"}


@functools.cache
def _once():
    LOG.error("said once")


class Closing:
    """Garbage in a cycle, which reads a clock when Python collects it."""

    def __init__(self):
        self.me = self

    def __del__(self):
        time.time()


def _collected():
    """As when somebody has left garbage behind, and the model runs as Python comes to collect it."""
    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(10):
            Closing()
    finally:
        gc.set_threshold(*before)


ALLOWED = {
    "somebody's garbage": _collected,
    "a message that comes once": _once,
    "a level that is off": lambda: LOG.debug("unseen"),
    "memory": lambda: io.StringIO().write("unseen") * 0.0,
    "an import": lambda: __import__("colorsys") and None,
    "a clock that torch reads": lambda: torch.autograd.profiler.record_function("part").__enter__() and None,
    "numbers of torch's own generator": lambda: torch.rand(()),
}


@pytest.mark.parametrize("use", ALLOWED)
def test_what_leaves_nothing_to_do_again_is_let_through(use):
    x = torch.randn(2, 4)
    model = Uses(ALLOWED[use])
    sys.modules.pop("colorsys", None)
    assert trace(model, x)(x).shape == (2, 5)
    assert sys.getprofile() is None


def test_whoever_profiles_keeps_his_profiler():
    seen = []
    sys.setprofile(lambda frame, event, called: seen.append(event))
    look = sys.getprofile()
    try:
        trace(Uses(lambda: None), torch.randn(2, 4))
        assert sys.getprofile() is look and seen
    finally:
        sys.setprofile(None)
    with cProfile.Profile() as profile:
        trace(Uses(lambda: None), torch.randn(2, 4))
    assert profile.getstats()
