"""autograd use: what hangs on gradients that only adapters bring, or on a function's own backward, is no graph's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorafx
from lorafx.capture.export import trace
from lorafx.errors import CaptureError


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -3 * gradient


def hooked(y):
    y.register_hook(lambda gradient: 5 * gradient)
    return y


def retained(y):
    if y.requires_grad:
        y.retain_grad()
    return y


USES = {
    "a function's own backward": lambda y: Reversed.apply(y),
    "one held by another name": Reversed.apply,
    "a hook": lambda y: hooked(y) if y.requires_grad else y,
    "a retained gradient": retained,
    "a branch on requires_grad": lambda y: 2 * y if y.requires_grad else y,
    "a branch on grad_fn": lambda y: y if y.grad_fn is None else 2 * y,
    "a branch on is_leaf": lambda y: y if y.is_leaf else 2 * y,
}


class Model(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.up, self.down, self.use = nn.Linear(4, 6), nn.Linear(6, 3), use

    def forward(self, x):
        return self.down(self.use(self.up(x)))


def gradients(model, x):
    """What a step gives, and the gradient of the weight of `up`, or of the factors that are added to it."""
    y = model(x)
    y.sin().sum().backward()
    return y.detach(), [p.grad for name, p in model.named_parameters() if name.startswith("up.") and p.grad is not None]


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_training_is_as_in_a_plain_model(use):
    base, x = Model(use).double(), torch.randn(5, 4, dtype=torch.float64)
    plain = Model(use).double()
    lora = lorafx.compile(
        base, {"r": 2, "target_modules": ["up"], "init_lora_weights": False}, autocast_adapter_dtype=False
    )
    a, b = (lora.get_parameter(f"up.lora_{side}.default.weight") for side in "AB")
    plain.load_state_dict(base.state_dict())
    scale = lorafx.of(lora).peft_config["default"].lora_alpha / 2
    with torch.no_grad():
        plain.up.weight.add_(scale * b @ a)
    with pytest.warns(UserWarning, match="could not be captured"):
        y, (of_a, of_b) = gradients(lora, x)
    expected, (of_weight, _) = gradients(plain, x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close((of_a, of_b), (scale * b.mT @ of_weight, scale * of_weight @ a.mT))


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_the_models_own_line_is_named(use):
    with pytest.raises(CaptureError, match=r"test_autograd_use\.py:\d+"):
        trace(Model(use).requires_grad_(False), torch.randn(5, 4))


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_without_gradients_it_is_a_graph(use):
    model, x = Model(use), torch.randn(5, 4)
    with torch.no_grad():
        torch.testing.assert_close(trace(model, x)(x), model(x))


def test_what_an_argument_wants_is_known_and_other_threads_are_let_alone():
    model = Model(lambda y: y)
    model.forward = lambda x: model.down(model.up(x * 2 if x.requires_grad else x))
    x = torch.randn(5, 4, requires_grad=True)
    torch.testing.assert_close(trace(model, x)(x), model(x))
    Reversed.apply(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((5, 4), -3.0))
