"""What LoHa and LoKr have in common: the dropouts, which draw other random numbers than PEFT's, and fields."""

import pytest
import torch
from torch import nn

import lorafx
from lorafx.errors import ConfigError


@pytest.mark.parametrize("capture", ["graph", "sites"])
def test_dropout_drops_rows_and_calls(capture):
    model, x = nn.Sequential(nn.Linear(8, 64)).double(), torch.randn(3, 8, dtype=torch.float64)
    config = lorafx.LoHaConfig(r=1, target_modules=["0"], init_weights=False, rank_dropout=0.25)
    lora = lorafx.compile(model, config, capture=capture)
    whole = (lora.eval()(x) - model(x)).detach()
    ratio = (lora.train()(x) - model(x)).detach() / whole
    kept = ratio[0] != 0
    assert 32 < kept.sum() < 64, "a quarter of 64 rows, give or take"
    torch.testing.assert_close(ratio, kept * 64 / kept.sum() + torch.zeros_like(ratio), rtol=1e-8, atol=1e-8)

    model = nn.Sequential(nn.Linear(8, 64)).double()
    lora = lorafx.compile(model, config.replace(rank_dropout=0.0, module_dropout=0.5), capture=capture)
    calls = [bool((lora(x) - model(x)).abs().max() > 0) for _ in range(40)]
    assert 5 < sum(calls) < 35


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "`r` must be a positive int"),
        ({"alpha": "8"}, "`alpha` must be a number"),
        ({"rank_dropout": 1.0}, "`rank_dropout` must be a number in"),
        ({"init_weights": "lycoris"}, "`init_weights` must be True or False"),
        ({"rank_pattern": {"a": 0}}, "`rank_pattern` must be"),
    ],
)
def test_a_wrong_field_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        lorafx.LoHaConfig(**changes)


def test_embeddings_are_refused():
    with pytest.raises(ConfigError, match="0 is an embedding, for which there is no LoHa"):
        lorafx.compile(nn.Sequential(nn.Embedding(5, 3)), lorafx.LoHaConfig(target_modules=["0"]))
