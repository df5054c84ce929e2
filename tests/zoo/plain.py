"""Plain torch, and models as people write them: prints, numpy, branches on data."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from .entry import LABELS, VOCABULARY, Call, Entry, ids, seeded

WIDTH = 24


def squared(output: Tensor, inputs: Call) -> Tensor:
    return output.square().mean()


def plain(
    model: type[nn.Module], inputs: Callable[[int, int], Call], targets: list[str] | str, cannot: str = ""
) -> Entry:
    return Entry(model.__name__, lambda: seeded(model), inputs, targets, squared, cannot)


def vectors(batch: int, length: int) -> Call:
    """(batch, length, WIDTH)"""
    return (torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(0)),)


def rows(batch: int, length: int) -> Call:
    """(length, batch, WIDTH)"""
    return (vectors(batch, length)[0].transpose(0, 1),)


def planes(batch: int, length: int) -> Call:
    """(batch, 4, length, 6)"""
    return (torch.randn(batch, 4, length, 6, generator=torch.Generator().manual_seed(0)),)


def words(batch: int, length: int) -> Call:
    """(batch, length) of ids"""
    return (ids(torch.Generator().manual_seed(0), batch, length),)


class MLP(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, 40), nn.GELU(), nn.Linear(40, LABELS, bias=False))


class CNN(nn.Module):
    """Two convolutions, one in groups, a batch norm and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 6, (3, 2), padding=1, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 9, 3, stride=2, padding=1)
        self.head = nn.Linear(9, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 4, height, width) -> (batch, LABELS)"""
        return self.head(self.second(torch.relu(self.norm(self.first(x)))).mean((2, 3)))


class MultiheadAttention(nn.Module):
    """Attention between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, WIDTH) -> (batch, length, LABELS)"""
        x = self.up(x)
        return self.head(self.attention(x, x, x, need_weights=False)[0])


class TransformerEncoder(nn.TransformerEncoder):
    """Batch second, as is the default: with it first, evaluation is one fused kernel, which PEFT's adapters escape."""

    def __init__(self) -> None:
        layer = nn.TransformerEncoderLayer(WIDTH, 4, dim_feedforward=40, dropout=0.0)
        super().__init__(layer, 2)


class LSTM(nn.Module):
    """Embeddings, a recurrent layer, and a head on its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.lstm = nn.LSTM(WIDTH, 20, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(40, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length) -> (batch, LABELS)"""
        return self.head(self.lstm(self.embed(x))[0][:, -1])


class Remote(MLP):
    """As in many a repository's own modeling file: it prints, and it computes a constant with numpy."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, WIDTH) -> (batch, length, LABELS)"""
        print("input", x.float().mean().item(), end="\r")
        positions = torch.from_numpy(np.arange(x.shape[1], dtype=np.float32))
        return super().forward(x + torch.sin(positions)[:, None])


class Branching(MLP):
    """A branch on a value, and as many rounds as a value says."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, WIDTH) -> (batch, length, LABELS)"""
        if x.mean() > 0:
            x = -x
        for _ in range(int(x.abs().max()) % 3):
            x = torch.tanh(x)
        return super().forward(x)


ENTRIES = (
    plain(MLP, vectors, ["0", "2"]),
    plain(CNN, planes, ["first", "second", "head"]),
    plain(
        MultiheadAttention,
        vectors,
        ["up", "head"],
        "`nn.MultiheadAttention` can be a target, or its `out_proj` alone; tests/peft/test_multihead.py compares that, "
        "as PEFT 0.21 adds the ΔW of its `out_proj` twice, a mistake, or (as a target alone) only once it is merged.",
    ),
    plain(TransformerEncoder, rows, ["linear1", "linear2"]),
    plain(LSTM, words, ["embed", "head"]),
    plain(Remote, vectors, "all-linear"),
    plain(Branching, vectors, ["0", "2"]),
)
