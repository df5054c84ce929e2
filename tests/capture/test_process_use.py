"""What a model asks of the process: environment variables are watched, and inference mode is no graph's."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

import lorafx
from lorafx.capture.export import trace
from lorafx.errors import CaptureError

READS = {
    "get": lambda: os.environ.get("LORAFX_TEST") == "on",
    "getenv": lambda: os.getenv("LORAFX_TEST", "off") == "on",
    "in": lambda: "LORAFX_TEST" in os.environ,
}


class Asks(nn.Module):
    """(…, 4) -> (…, 5), doubled where a question is answered with yes."""

    def __init__(self, asks):
        super().__init__()
        self.lin, self.asks = nn.Linear(4, 5), asks

    def forward(self, x):
        y = self.lin(x)
        return 2 * y if self.asks(y) else y


@pytest.mark.parametrize("read", READS)
def test_an_environment_variable_that_is_read_is_watched(read, monkeypatch):
    monkeypatch.delenv("LORAFX_TEST", raising=False)
    base, x = Asks(lambda _: READS[read]()), torch.randn(2, 4)
    lora = lorafx.compile(base, {"r": 2, "target_modules": ["lin"]}, capture="graph")
    for value in (None, "on", None, "on"):
        monkeypatch.delenv("LORAFX_TEST", raising=False) if value is None else monkeypatch.setenv("LORAFX_TEST", value)
        torch.testing.assert_close(lora(x), base(x))
    assert [call.hits for call in lora.explain().calls] == [1, 1]


QUESTIONS = {"torch": lambda _: torch.is_inference_mode_enabled(), "a tensor": lambda y: y.is_inference()}


@pytest.mark.parametrize("asked", QUESTIONS)
def test_a_model_that_asks_for_inference_mode_has_no_graph(asked):
    base, x = Asks(QUESTIONS[asked]), torch.randn(2, 4)
    with pytest.raises(CaptureError, match="inference mode"):
        trace(base, x)
    lora = lorafx.compile(base, {"r": 2, "target_modules": ["lin"]}).eval()
    with pytest.warns(UserWarning, match="inference mode"):
        for mode in (torch.no_grad, torch.inference_mode, torch.no_grad):
            with mode():
                torch.testing.assert_close(lora(x), base(x))
