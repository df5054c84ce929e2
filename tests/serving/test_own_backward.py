"""What runs beside a model's own code: autograd functions of its own, gradients that it asks for, threads."""

from concurrent.futures import ThreadPoolExecutor
from threading import Thread

import pytest
import torch
import torch.nn.functional as F
from serving_models import random, twins
from torch import nn

from lorafx.errors import UncoveredOperatorError


class OwnLinear(torch.autograd.Function):
    """A linear layer with a backward written by hand."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return dy @ weight, dy.T @ x


class Again(torch.autograd.Function):
    """Calls a module, and again in backward, as checkpoints and reversible layers do."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        ctx.save_for_backward(x)
        return module(x)

    @staticmethod
    def backward(ctx, dy):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.module(x).backward(dy)
        return x.grad, None


def by_forces(net, x):
    """What physicists train: the gradient of an energy for positions."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        energy = torch.tanh(F.linear(net.first(x), net.second.weight)).square().sum()
    return torch.autograd.grad(energy, x, create_graph=True)[0]


POOL = ThreadPoolExecutor(1)  # whose thread is started within a call, and goes on


def by_threads(net, x):
    def first():
        hidden.append(net.first(x))

    hidden, thread = [], Thread(target=first)
    thread.start()
    thread.join()
    return POOL.submit(F.linear, torch.tanh(hidden[0]), net.second.weight).result()


class Net(nn.Module):
    """(n, 3) -> (n, …), in a way of its own, and never a graph, as it branches on data."""

    def __init__(self, run):
        super().__init__()
        self.first, self.second, self.__dict__["run"] = nn.Linear(3, 6), nn.Linear(6, 4), run

    def forward(self, x):
        return self.run(self, x) if x.sum() > -1e9 else x


def gradients(lora, plain, x):
    """For each tensor of an adapter the gradient that it has, and the one that follows from the plain weight's."""
    lora.zero_grad()
    plain.zero_grad()
    outputs = [net(x) for net in (lora, plain)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for path in ("first", "second"):
        site, dense = lora.get_submodule(path), plain.get_submodule(path).weight.grad
        a, b = site.lora_A["default"].weight, site.lora_B["default"].weight
        yield a.grad, 3 * b.T @ dense
        yield b.grad, 3 * dense @ a.T


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize(
    "run",
    [by_forces, by_threads, lambda net, x: Again.apply(torch.tanh(net.first(x)), net.second)],
    ids=["forces", "threads", "again"],
)
def test_adapters_train_through_what_runs_beside_the_models_own_code(run):
    """In the first calls, which are looked at function by function, and in later ones."""
    lora, plain = twins(Net(run))
    plain.requires_grad_(True)
    for _ in range(4):
        for actual, expected in gradients(lora, plain, random(5, 3)):
            torch.testing.assert_close(actual, expected)
    assert type(lora.second.weight) is nn.Parameter, "nobody watches it any more, not even a thread that goes on"


@pytest.mark.usefixtures("early")
def test_a_backward_that_knows_of_no_adapter_is_refused_in_training():
    lora, plain = twins(Net(lambda net, x: OwnLinear.apply(torch.tanh(net.first(x)), net.second.weight)))
    x = random(5, 3)
    with torch.no_grad():
        torch.testing.assert_close(lora(x), plain(x))
    with pytest.raises(UncoveredOperatorError, match=r"OwnLinear.forward reads an adapted weight.*test_own_backward"):
        lora(x)
