"""replacing: what stands in the place of other functions goes away with the last who needs it, in whatever thread."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import lorafx
from lorafx.torch_private.replacing import fastpath_replaced, function_applications_seen


class Named(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(4, 6)})

    def forward(self, x):
        return sum(layer(x) for layer in self.layers.values())


def encode(self, *args):
    """Stands in for an encoder's forward."""


def test_the_switch_is_back_when_the_last_thread_needs_it_no_more():
    plain, inside, done = nn.TransformerEncoder.forward, threading.Event(), threading.Event()

    def other():
        with fastpath_replaced(encode):
            inside.set()
            done.wait(5)

    thread = threading.Thread(target=other)
    with fastpath_replaced(encode):
        thread.start()
        inside.wait(5)
    assert not torch.backends.mha.get_fastpath_enabled() and nn.TransformerEncoder.forward is encode
    done.set()
    thread.join()
    assert torch.backends.mha.get_fastpath_enabled() and nn.TransformerEncoder.forward is plain


def test_functions_are_applied_as_ever_afterwards():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

    seen, held = [], Twice.apply
    with function_applications_seen(seen.append):
        assert held(torch.ones(())).item() == Twice.apply(torch.ones(())).item() == 2.0
    held(torch.ones(()))
    assert seen == [Twice, Twice]


@pytest.mark.parametrize("name", ["class", "None", "a b", "it's", 'a "b"', "two\nlines"])
def test_modules_may_be_called_what_python_would_not_have(name):
    model, x = Named(name), torch.randn(5, 4)
    for capture in ("graph", "sites"):
        lora = lorafx.compile(model, {"r": 2, "target_modules": [name]}, capture=capture)
        torch.testing.assert_close(lora(x), model(x))
