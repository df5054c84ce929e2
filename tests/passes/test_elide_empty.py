"""elide_empty: what is joined to a tensor of no elements is that other tensor itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorafx.capture.export import trace
from lorafx.passes import Canonicalize, ElideEmpty
from lorafx.pipeline import Pipeline

join = torch.ops.aten.cat.default


class Joined(nn.Module):
    """An empty cache of one dimension, as transformers makes it, and what is added to it."""

    def forward(self, x):
        return torch.cat([torch.tensor([]), (2 * x).transpose(0, 1)], -2)


class OfTheCaller(Joined):
    def forward(self, x):
        return torch.cat([torch.tensor([]), x[:, 1:]], -2)


class Written(Joined):
    def forward(self, x):
        y = 2 * x
        z = torch.cat([torch.tensor([]), y], -2)
        y += 1
        return z


class Full(Joined):
    def forward(self, x):
        return torch.cat([torch.zeros(1, 3), 2 * x], -2)


class OfAnotherDtype(Joined):
    def forward(self, x):
        return torch.cat([torch.tensor([], dtype=torch.float64), 2 * x], -2)


@pytest.mark.parametrize(
    ("model", "joins"),
    [(Joined(), 0), (OfTheCaller(), 1), (Written(), 1), (Full(), 1), (OfAnotherDtype(), 1)],
    ids=["empty", "of the caller", "written", "full", "of another dtype"],
)
def test_what_is_joined_to_nothing_is_itself(model, joins):
    gm = trace(model, torch.randn(4, 3))
    Pipeline(Canonicalize(), ElideEmpty()).run(gm)
    assert len(gm.graph.find_nodes(op="call_function", target=join)) == joins
    assert bool(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.lift_fresh_copy.default)) == bool(
        joins and not isinstance(model, Full)
    )
    x = torch.randn(6, 3)
    assert torch.equal(gm(x), model(x)) and gm(x).dtype == model(x).dtype
    assert gm(x).data_ptr() != x.data_ptr()
