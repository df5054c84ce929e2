"""restore_gqa: keys and values are not repeated for the heads that share them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lorafx.capture.export import trace
from lorafx.passes import Canonicalize, RestoreGqa
from lorafx.pipeline import Pipeline

attention = torch.ops.aten.scaled_dot_product_attention.default


def repeat(x, times):
    batch, heads, length, width = x.shape
    return x[:, :, None].expand(batch, heads, times, length, width).reshape(batch, heads * times, length, width)


def repeat_all_the_rest(x, times):
    """The same, with -1 for the sizes that stay."""
    return x[:, :, None].expand(-1, -1, times, -1, -1).reshape(x.shape[0], -1, *x.shape[2:])


def tile(x, times):
    """Heads in another order: not the grouping that the operator means."""
    batch, heads, length, width = x.shape
    return x[:, None].expand(batch, times, heads, length, width).reshape(batch, heads * times, length, width)


class Grouped(nn.Module):
    """(…, 12) -> (…, 12): six heads of two that share two keys and values."""

    def __init__(self, repeat, causal=True, masked=False):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 12), nn.Linear(12, 4), nn.Linear(12, 4)
        self.repeat, self.causal, self.masked = repeat, causal, masked

    def forward(self, x):
        q, k, v = (each(x).unflatten(-1, (-1, 2)).transpose(1, 2) for each in (self.q, self.k, self.v))
        k, v = self.repeat(k, 3), self.repeat(v, 3)
        mask = (x[..., :1] > -100)[:, None] if self.masked else None
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal, scale=0.4)
        return y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("model", "restored"),
    [
        (Grouped(repeat), True),
        pytest.param(Grouped(repeat, causal=False), True, marks=pytest.mark.slow),
        pytest.param(Grouped(repeat_all_the_rest), True, marks=pytest.mark.slow),
        (Grouped(repeat, causal=False, masked=True), False),
        (Grouped(tile), False),
    ],
    ids=["causal", "of all", "by -1", "masked", "tiled"],
)
def test_repeated_heads_are_shared(model, restored):
    gm = trace(model, torch.randn(2, 5, 12))
    Pipeline(Canonicalize(), RestoreGqa()).run(gm)
    (node,) = [node for node in gm.graph.nodes if node.target is attention]
    assert node.kwargs.get("enable_gqa", False) == restored
    assert any(n.target is torch.ops.aten.expand.default for n in gm.graph.nodes) != restored
    x = torch.randn(3, 9, 12)
    outputs = [run(x) for run in (gm, model)]
    gradients = [torch.autograd.grad(output.sin().sum(), list(model.parameters())) for output in outputs]
    torch.testing.assert_close(*outputs)
    for found, expected in zip(*gradients):
        torch.testing.assert_close(found, expected)


class OneQuery(nn.Module):
    """(…, 2) -> (…, 6, 2): one head asks all, of which each is there thrice."""

    def forward(self, x):
        heads = repeat(torch.stack([x, x.sin()], 1), 3)
        return F.scaled_dot_product_attention(x[:, None], heads, heads)


@pytest.mark.slow
def test_heads_that_are_not_as_many_as_asked_for_stay_repeated():
    model, x = OneQuery(), torch.randn(2, 5, 2)
    gm = trace(model, x)
    Pipeline(Canonicalize(), RestoreGqa()).run(gm)
    torch.testing.assert_close(gm(x), model(x))


class Stretched(nn.Module):
    """(2, length, 4) -> the same, each key and value three times over, of one sequence."""

    def forward(self, x):
        keys = x[:, :, None].expand(2, x.shape[1], 3, 4).reshape(2, -1, 4)
        return F.scaled_dot_product_attention(x, keys, keys)


def test_keys_of_other_dimensions_stay():
    model, x = Stretched(), torch.randn(2, 5, 4)
    gm = trace(model, x)
    Pipeline(Canonicalize(), RestoreGqa()).run(gm)
    torch.testing.assert_close(gm(x), model(x))
