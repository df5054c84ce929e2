"""Kinds beside PEFT's: a row is a config that both libraries take, and the layers that it acts on.

Models are in float64, and an adapter's values random, as PEFT saved them: what the two compute differs by rounding.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import models
import peft
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorafx

PREFIX = "base_model.model."
CLOSE = {"rtol": 1e-10, "atol": 1e-10}  # of sums of at most a few hundred products in float64


class Pair(nn.Module):
    """(…, n) -> (…, n): one layer up, a tanh, and one down."""

    def __init__(self, up: nn.Module, down: nn.Module):
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Repeated(nn.Module):
    """Equal pairs one after another, each added to what it was given; `embed` makes rows of numbers first."""

    def __init__(self, make: Callable[[], nn.Module], embed: nn.Module | None = None):
        super().__init__()
        self.embed = embed
        self.layers = nn.ModuleList(make() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.embed is None else self.embed(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


# What to build, and an input for it. No layer is square, and every other one has no bias.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: Repeated(lambda: Pair(nn.Linear(8, 12), nn.Linear(12, 8, bias=False))), (3, 5, 8)),
    "addmm": (lambda: Repeated(lambda: Pair(Conv1D(12, 8), Conv1D(8, 12))), (3, 5, 8)),
    "embedding": (
        lambda: Repeated(lambda: Pair(nn.Linear(8, 12), nn.Linear(12, 8)), nn.Embedding(11, 8, padding_idx=2)),
        (3, 5),
    ),
    "conv1d": (
        lambda: Repeated(lambda: Pair(nn.Conv1d(4, 6, 3, padding=1), nn.Conv1d(6, 4, 1, bias=False))),
        (2, 4, 7),
    ),
    "conv2d": (
        lambda: Repeated(lambda: Pair(nn.Conv2d(4, 6, (3, 1), padding=(1, 0)), nn.Conv2d(6, 4, 1, bias=False))),
        (2, 4, 5, 6),
    ),
    "conv3d": (
        lambda: Repeated(lambda: Pair(nn.Conv3d(4, 6, (1, 3, 1), padding=(0, 1, 0)), nn.Conv3d(6, 4, 1, bias=False))),
        (2, 4, 2, 5, 3),
    ),
    "groups": (
        lambda: Repeated(lambda: Pair(nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.Conv2d(6, 4, 1, bias=False))),
        (2, 4, 5, 6),
    ),
}


@dataclass(frozen=True)
class KindCase:
    """A config by the name and fields that both libraries have, and the layers that it acts on.

    `starts_at_zero` says that PEFT's start values change nothing, `merges` that it is a change of the base's tensors.
    `dropout` says that a training step draws random numbers: PEFT's, from the same seed.
    """

    layers: str
    config: str
    fields: dict[str, Any] = field(default_factory=dict)
    starts_at_zero: bool = True
    merges: bool = True
    dropout: bool = False

    @property
    def targets(self) -> list[str]:
        return ["embed", "up"] if self.layers == "embedding" else ["up", "down"]

    def base(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return LAYERS[self.layers][0]().double()

    def x(self) -> Tensor:
        rng, shape = torch.Generator().manual_seed(1), LAYERS[self.layers][1]
        if self.layers == "embedding":
            return torch.randint(11, shape, generator=rng)
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    @property
    def inputs(self) -> models.Call:
        return (self.x(),)

    def theirs(self) -> peft.PeftConfig:
        return getattr(peft, self.config)(**{"target_modules": self.targets} | self.fields)

    def ours(self) -> Any:
        return getattr(lorafx, self.config)(**{"target_modules": self.targets} | self.fields)


LORA = {"r": 2, "lora_alpha": 3}
CASES = {
    "lora linear": KindCase("linear", "LoraConfig", LORA),
    "lora addmm": KindCase("addmm", "LoraConfig", LORA | {"fan_in_fan_out": True}),
    "lora embedding": KindCase("embedding", "LoraConfig", LORA),
    "lora conv2d": KindCase("conv2d", "LoraConfig", LORA),
}


@dataclass(frozen=True)
class Both:
    """A case: the folder that PEFT wrote, and the two models that read it, each on a copy of the same base."""

    case: KindCase
    base: nn.Module
    folder: Path
    theirs: peft.PeftModel
    ours: lorafx.AdaptedModel


def both(case: KindCase, folder: Path, base: nn.Module | None = None, **options: Any) -> Both:
    """PEFT makes an adapter of random values and saves it to `folder`; both load it to train, we by `options`."""
    base = case.base() if base is None else base
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(copy.deepcopy(base), case.theirs())
        shake(made)
        made.save_pretrained(folder)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True)
    ours = lorafx.load(copy.deepcopy(base), folder, is_trainable=True, **options)
    return Both(case, base, folder, theirs, ours)


def shake(model: nn.Module) -> None:
    """Move all that trains away from where it starts."""
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=0.2)


def step(model: nn.Module, inputs: models.Call) -> tuple[Tensor, dict[str, Tensor]]:
    """A training step of either model: the output, and the gradients by names that both share."""
    model.train()
    model.zero_grad()
    torch.manual_seed(3)
    out = models.logits(models.run(model, inputs))
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return out.detach(), {name: p.grad for name, p in trained(model).items()}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a model of either library trains, by names that both share."""
    return {name.removeprefix(PREFIX): p for name, p in model.named_parameters() if p.requires_grad}
