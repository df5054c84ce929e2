"""Runs a test's function while torch traces, with the tracer and tensors that have nodes in its graph."""

from __future__ import annotations

from collections import Counter
from itertools import count
from types import SimpleNamespace

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx

from lorafx.capture.repeated.record import Record, Step
from lorafx.capture.repeated.recorder import Recorder
from lorafx.capture.repeated.replayer import Replayer
from lorafx.torch_private.tracing import detect_fake_mode


def traced(function, *tensors):
    """The graph of what `function(context, *tensors)` traces; `context` makes recorders and replayers of layers."""

    def run(*inputs):
        function(Context(inputs), *inputs)
        return inputs[0] + 1

    return make_fx(run, tracing_mode="fake")(*(tensors or (torch.ones(2, 3),)))


class Context:
    def __init__(self, inputs):
        self.tracer, self.mode = get_proxy_mode().tracer, detect_fake_mode(inputs)
        self.start, self.numbers = Step(), count()

    def record(self, path="layer", layer=None):
        return Record(layer or nn.Module(), path, self.start, Counter(), self.tracer)

    def recorder(self, path="first"):
        return Recorder(self.record(path), nn.Module())

    def replayer(self, path="second"):
        return Replayer(self.record(path), self.mode)

    def run_first(self, x, *functions):
        """Trace a layer that asks for these functions one after another, each on what the one before gave."""
        recorder = self.recorder()
        for function in functions:
            x = recorder.ask((function, recorder.record.name(x)), function, (x,), {})
        recorder.finish(self.numbers)
        return SimpleNamespace(recorder=recorder, output=x)

    def replay(self, replayer, x, *functions):
        """What a layer is answered that asks for these functions, each of which is known."""
        for function in functions:
            question = function, replayer.record.name(x)
            assert replayer.knows(question)
            x = replayer.answer(question, function, (x,), {})
        return x
