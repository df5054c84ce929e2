"""What a zoo entry is, and what entries share: seeded random models, and inputs that fit them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Generator, Tensor, nn

Call = dict[str, Any] | tuple[Any, ...]
Inputs = Callable[[int, int], Call]

VOCABULARY, LABELS, IMAGE_SIZE = 97, 3, 16
WORDS = 3, 90  # first id, and last plus one: what lies around them means padding, an image, the end ...
RANDOM_FIELD = re.compile("drop|jitter|mask_(time|feature)_prob")


def own_loss(output: Any, inputs: Call) -> Tensor:
    """The loss that a model computes itself, from labels in its inputs."""
    return output.loss


@dataclass(frozen=True)
class Entry:
    """A tiny random model, calls that fit it, and PEFT's `target_modules` for its attention and MLP at least.

    `build` gives the same bits each time, the same in train and eval mode; `inputs(batch, length)` gives keyword
    arguments as a dict or positional ones as a tuple, `loss(output, inputs)` a scalar to differentiate. `cannot` says
    what PEFT does with this model and lorafx does not.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    targets: list[str] | str
    loss: Callable[[Any, Call], Tensor] = own_loss
    cannot: str = ""


def pretrained(name: str, inputs: Inputs, targets: list[str] | str, settings: dict[str, Any]) -> Entry:
    """An entry for the transformers class of this name."""

    def make() -> nn.Module:
        model = getattr(transformers, name)
        return model(without_chance(model.config_class(**settings)))

    return Entry(name, lambda: seeded(make), inputs, targets)


def without_chance(config: transformers.PreTrainedConfig) -> transformers.PreTrainedConfig:
    """The config with each probability of dropping, masking or jittering something at 0, in its parts too."""
    for field, value in vars(config).items():
        if isinstance(value, transformers.PreTrainedConfig):
            without_chance(value)
        elif RANDOM_FIELD.search(field) and isinstance(value, float):
            setattr(config, field, 0.0)
    return config


@torch.no_grad()
def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """A model from a fixed seed, every parameter moved off its start: biases off 0, norms off 1, routers off ties."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def ids(rng: Generator, *shape: int) -> Tensor:
    """Random words."""
    return torch.randint(*WORDS, shape, generator=rng)


def images(rng: Generator, batch: int) -> Tensor:
    """(batch, 3, IMAGE_SIZE, IMAGE_SIZE)"""
    return torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=rng)


def classes(batch: int) -> Tensor:
    """A label for each of a batch."""
    return torch.arange(batch) % LABELS


def sequences(batch: int, length: int) -> Call:
    """Tokens with a label each, for language models and for encoder-decoders alike."""
    rng = Generator().manual_seed(0)
    return {"input_ids": ids(rng, batch, length), "labels": ids(rng, batch, length)}


def sentences(batch: int, length: int) -> Call:
    """Tokens with a label for the whole."""
    return {"input_ids": ids(Generator().manual_seed(0), batch, length), "labels": classes(batch)}


def pictures(batch: int, length: int) -> Call:
    """Images with a label; they have no length."""
    return {"pixel_values": images(Generator().manual_seed(0), batch), "labels": classes(batch)}
