"""Functions of TorchScript that read an adapted weight are sites' operators, or refused by name."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lorafx
from lorafx.errors import UncoveredOperatorError


def product(x, weight):
    return F.linear(x, weight)


def negated(script):
    return -script


class Product(nn.Module):
    def forward(self, x, weight):
        return F.linear(x, weight)


class Given(nn.Module):
    """(n, 6) -> (n, 4): the weight of the first layer is given to a function."""

    def __init__(self, function):
        super().__init__()
        self.first, self.second = nn.Linear(6, 10, bias=False), nn.Linear(10, 4)
        self.function = [function]  # no module of the model's

    def forward(self, x):
        return self.second(self.function[0](x, self.first.weight))


def adapted(function, capture):
    torch.manual_seed(0)
    config = {"r": 2, "target_modules": ["first", "second"], "init_lora_weights": False}
    return lorafx.compile(Given(function), config, random_state=0, capture=capture)


EXAMPLE = torch.ones(3, 6), torch.ones(10, 6)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "capture"),
    [
        (lambda: torch.jit.script(product), "auto"),
        (lambda: torch.jit.trace(F.linear, EXAMPLE), "sites"),
        (lambda: torch.jit.trace(Product(), EXAMPLE), "auto"),
    ],
)
def test_a_script_that_is_given_a_weight_is_adapted(make, capture):
    x = torch.randn(5, 6)
    plain, lora = adapted(F.linear, capture), adapted(make(), capture)
    for _ in range(2):
        outputs = [model(x) for model in (plain, lora)]
        torch.testing.assert_close(*outputs)
        gradients = [
            torch.autograd.grad(y.sum(), [p for p in m.parameters() if p.requires_grad])
            for y, m in zip(outputs, (plain, lora))
        ]
        torch.testing.assert_close(*gradients)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_script_that_can_be_no_graph_is_named():
    lora = adapted(torch.jit.script(Product()), "sites")
    with pytest.raises(UncoveredOperatorError, match="forward of TorchScript reads an adapted weight"):
        lora(torch.randn(5, 6))


def test_scripts_elsewhere_run_as_they_are():
    script = torch.jit.trace(F.linear, EXAMPLE)
    torch.testing.assert_close(script(*EXAMPLE), F.linear(*EXAMPLE))
    assert torch.jit.script(negated)(script=EXAMPLE[0]).sum() == -18
