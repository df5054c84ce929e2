"""Small modules that several test files adapt."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D


class EveryForm(nn.Module):
    """(batch, length) of row numbers below 11 -> (batch, 3): a module of each form."""

    def __init__(self):
        super().__init__()
        self.embedding, self.conv1d = nn.Embedding(11, 4), nn.Conv1d(4, 6, 3, padding="same", groups=2)
        self.conv2d, self.conv3d = nn.Conv2d(1, 5, (3, 2)), nn.Conv3d(5, 7, (2, 1, 2))
        self.addmm, self.linear = Conv1D(5, 7), nn.Linear(5, 3, bias=False)

    def forward(self, ids):
        image = self.conv2d(self.conv1d(self.embedding(ids).transpose(1, 2))[:, None])
        volume = self.conv3d(image[..., None].expand(-1, -1, -1, -1, 3))
        return self.linear(self.addmm(volume.mean((2, 3, 4))))


class Tied(nn.Module):
    """(…,) of row numbers below 11 -> (…, 11): an embedding and a head that share one weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 5), nn.Linear(5, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)))


class DeeperTied(Tied):
    """The same with a linear layer in between."""

    def __init__(self):
        super().__init__()
        self.middle = nn.Linear(5, 5)

    def forward(self, ids):
        return self.head(self.middle(self.embed(ids)))


class Gates(nn.Module):
    """(…), (…) -> two of (…): a gate that opens itself, and one that does not."""

    def forward(self, x, y):
        gated = torch.sigmoid(x) * x
        return gated + y, torch.sigmoid(y) * x


class Fork(nn.Module):
    """(…, 4) -> (…, 3): three linear layers of one value, and one of another."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(4, 5, bias=False), nn.Linear(4, 3)
        self.d = nn.Linear(5, 3)

    def forward(self, x):
        x = x.sin()
        return self.a(x) + self.d(self.b(x)) * self.c(x)


class Layer(nn.Module):
    """(…, width), a scale -> (…, width): a residual layer."""

    def __init__(self, width=4, inner=6, act=torch.relu):
        super().__init__()
        self.up, self.down, self.act = nn.Linear(width, inner), nn.Linear(inner, width, bias=False), act

    def forward(self, x, scale):
        return x + self.down(self.act(self.up(x))) * scale


class Stack(nn.Module):
    """(…, 4) -> (…, 3): layers of the kinds that `make` gives by number."""

    def __init__(self, make=lambda number: Layer(), depth=4):
        super().__init__()
        self.layers = nn.ModuleList(make(number) for number in range(depth))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        scale = x.mean()
        for layer in self.layers:
            x = layer(x, scale)
        return self.head(x)


SLOPES = (lambda x: nn.functional.leaky_relu(x, 0.1), lambda x: nn.functional.leaky_relu(x, 0.2))
DIFFERENCES = (lambda x: x - torch.tanh(x), lambda x: torch.tanh(x) - x)
KINDS = {
    "one": (lambda number: Layer(), [[0, 1, 2, 3]]),
    "alternating": (lambda number: Layer(act=(torch.relu, torch.tanh)[number % 2]), [[0, 2], [1, 3]]),
    "a constant": (lambda number: Layer(act=SLOPES[number // 2]), [[0, 1], [2, 3]]),
    "the order of operands": (lambda number: Layer(act=DIFFERENCES[number % 2]), [[0, 2], [1, 3]]),
    "by width": (lambda number: Layer(inner=6 + number // 2), [[0, 1], [2, 3]]),
    "an odd one": (lambda number: Layer(inner=9 if number == 2 else 6), [[0, 1, 3], [2]]),
    "none": (lambda number: Layer(inner=6 + number), []),
}


def cases(names, *, quick):
    """A parametrisation by name, of which these names are in the quick part."""
    assert all(name in names for name in quick)
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def tiny_llama(**options) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "vocab_size": 99}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **options}))


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 99, (batch, length))
