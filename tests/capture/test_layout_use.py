"""layout use: a model that asks how its arguments lie in memory is answered for each as it lies."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorafx

ASKS = {
    "is_contiguous": lambda x: x.is_contiguous(),
    "stride": lambda x: x.stride(-1) == 1 and x.stride(0) == x.shape[1],
}


class Asking(nn.Module):
    def __init__(self, ask):
        super().__init__()
        self.up, self.ask = nn.Linear(4, 6), ask

    def forward(self, x):
        return self.up(x) if self.ask(x) else 2 * self.up(x)


@pytest.mark.parametrize("contiguous_first", [True, False])
@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
def test_each_layout_goes_its_own_way(ask, contiguous_first):
    base = Asking(ask)
    lora = lorafx.compile(base, {"r": 2, "target_modules": ["up"]})
    arguments = [torch.randn(3, 4), torch.randn(4, 3).t(), torch.randn(3, 8)[:, ::2], torch.randn(5, 4)]
    for x in arguments if contiguous_first else arguments[::-1][1:]:
        torch.testing.assert_close(lora(x), base(x))
    assert lora.explain().calls[0].served_by == ("graph" if contiguous_first else "sites")


def test_a_model_that_does_not_ask_has_one_graph_for_all():
    base = Asking(lambda x: True)
    lora = lorafx.compile(base, {"r": 2, "target_modules": ["up"]})
    for x in (torch.randn(3, 4), torch.randn(4, 3).t(), torch.randn(3, 8)[:, ::2]):
        torch.testing.assert_close(lora(x), base(x))
    assert [call.served_by for call in lora.explain().calls] == ["graph"]
