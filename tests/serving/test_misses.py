"""Misses: explain() says in what a new kind of call differed."""

import warnings

import pytest
import torch
from graphs import adapted
from serving_models import Options, whys


@pytest.mark.slow
def test_it_says_in_what_a_call_differed():
    lora, x = adapted(Options()), torch.randn(5, 4)
    lora(x)
    lora(x, scale=torch.ones(3))
    lora(torch.randn(1, 4))
    with torch.no_grad():
        lora(x)
    lora.eval()(x)
    assert whys(lora) == [
        "the first call",
        "scale: not given → (n) float32 on cpu",
        "x: (n, n) float32 on cpu → (1, n) float32 on cpu",
        "grad: True → False",
        "the model's modes (train or eval), dtypes, devices, hooks or modules",
    ]
    assert "a new kind because of" in str(lora.explain())


@pytest.mark.slow
def test_a_constant_that_keeps_changing_is_named_once():
    lora, x = adapted(Options()), torch.randn(5, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(8):
            lora(x, scale=0.5 + step / 10)
    messages = [str(w.message) for w in caught if "values so far" in str(w.message)]
    assert len(messages) == 1 and "argument scale" in messages[0]
