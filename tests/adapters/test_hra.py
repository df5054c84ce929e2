"""HRA where PEFT has no answer, or another; the rest is held to PEFT's in tests/peft/test_kinds.py."""

import pytest
import torch
from torch import nn

import lorafx
from lorafx.errors import ConfigError


def test_in_half_precision_pairs_cancel_to_rounding():
    model, x = nn.Sequential(nn.Linear(48, 32)).bfloat16(), torch.randn(4, 48).bfloat16()
    lora = lorafx.compile(model, lorafx.HRAConfig(target_modules=["0"], r=4))
    torch.testing.assert_close(lora(x), model(x), rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("changes", [{"apply_GS": True}, {"r": 3}])
def test_what_changes_the_model_from_the_start_is_said_and_finite(changes):
    model, x = nn.Sequential(nn.Linear(8, 5)), torch.randn(4, 8)
    with pytest.warns(UserWarning, match="change the model from the start"):
        lora = lorafx.compile(model, lorafx.HRAConfig(target_modules=["0"], **{"r": 4} | changes))
    assert lora(x).isfinite().all() and not torch.allclose(lora(x), model(x))


@pytest.mark.parametrize(
    ("layer", "changes", "message"),
    [
        (nn.Conv2d(4, 6, 3, groups=2), {}, "0 is a convolution of 2 groups"),
        (nn.Embedding(4, 6), {}, "0 is an embedding, for which there is no HRA"),
        (nn.Linear(4, 6), {"apply_GS": True}, "0 has 4 inputs"),
    ],
)
def test_what_it_cannot_do_is_refused(layer, changes, message):
    with pytest.raises(ConfigError, match=message):
        lorafx.compile(nn.Sequential(layer), lorafx.HRAConfig(target_modules=["0"], **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "`r` must be a positive int"),
        ({"bias": "oft_only"}, "`bias` must be"),
        ({"apply_GS": 1}, "`apply_GS`"),
    ],
)
def test_a_wrong_field_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        lorafx.HRAConfig(**changes)
