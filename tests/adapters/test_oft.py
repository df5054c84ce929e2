"""OFT where PEFT has no answer, or another; the rest is held to PEFT's in tests/peft/test_kinds.py."""

import pytest
import torch
from peft.tuners.oft.layer import OFTLayer
from torch import nn

import lorafx
from lorafx.adapters.kinds.oft import _nearest_divisor
from lorafx.errors import ConfigError


@pytest.mark.parametrize("features", [12, 48, 7, 90])
def test_sizes_are_adjusted_as_in_peft(features):
    for wanted in range(1, 2 * features):
        assert _nearest_divisor(features, wanted) == OFTLayer.adjust_oft_parameters(None, features, wanted)


def test_an_adjusted_size_is_said():
    with pytest.warns(UserWarning, match="`oft_block_size` 32 does not divide all sizes: it is 12 at 0"):
        lorafx.compile(nn.Sequential(nn.Linear(12, 5)), lorafx.OFTConfig(target_modules=["0"]))


def test_half_precision_keeps_small_turns():
    model, x = nn.Sequential(nn.Linear(8, 32)).bfloat16(), torch.randn(4, 8).bfloat16()
    lora = lorafx.compile(model, lorafx.OFTConfig(target_modules=["0"], oft_block_size=4))
    assert torch.equal(lora(x), model(x))
    with torch.no_grad():
        lora[0].oft_R.default.weight.fill_(2**-11)  # beside 1 it would be rounded away
    lora(x).float().square().sum().backward()
    assert lora[0].oft_R.default.weight.grad.abs().max() > 0
    assert lora(x).sub(model(x)).abs().max() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 2}, "one of `r` and `oft_block_size` must be 0"),
        ({"oft_block_size": 0}, "one of `r` and `oft_block_size` must be 0"),
        ({"num_cayley_neumann_terms": 0}, "`num_cayley_neumann_terms` must be a positive int"),
        ({"bias": "lora_only"}, '`bias` must be "none", "all" or "oft_only"'),
    ],
)
def test_a_wrong_field_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        lorafx.OFTConfig(**changes)


@pytest.mark.parametrize(
    ("layer", "config", "message"),
    [
        (nn.Conv2d(4, 6, 3), lorafx.OFTConfig(target_modules=["0"]), "0 is a convolution with a kernel or groups"),
        (nn.Linear(4, 6), lorafx.OFTConfig(target_modules=["0"], coft=True), "coft=True"),
    ],
)
def test_what_it_cannot_do_is_refused(layer, config, message):
    with pytest.raises(ConfigError, match=message):
        lorafx.compile(nn.Sequential(layer), config)
