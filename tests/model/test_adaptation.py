"""The interface of an adapted model: what it says of itself, and the calls that it refuses."""

import pytest
import torch
from graphs import Chain, adapted

from lorafx.errors import AdapterError


def test_the_line_of_counts_is_pefts(capsys):
    lora = adapted(Chain(), target_modules=["second"])
    lora.print_trainable_parameters()
    trainable, total = 2 * 6 + 3 * 2, 24 + 21 + 18
    expected = f"trainable params: {trainable} || all params: {total} || trainable%: {100 * trainable / total:.4f}\n"
    assert capsys.readouterr().out == expected


def test_it_introduces_itself():
    assert repr(adapted(Chain())) == "AdaptedModel(Chain, 2 sites, adapters: default*)"


def test_names_for_rows_that_are_not_there_are_refused_everywhere():
    class Generates(Chain):
        def generate(self, x, **kwargs):
            raise AssertionError("generation has begun")

    lora, rows = adapted(Generates()), ["default", "other"] * 2 + ["default"]
    for call in (lora, lora.first, lora.generate):
        with pytest.raises(AdapterError, match="there is no adapter 'other'"):
            call(torch.randn(5, 4), adapter_names=rows)
