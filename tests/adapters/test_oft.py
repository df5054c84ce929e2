"""OFT where PEFT has no answer, or another; the rest is held to PEFT's in tests/peft/test_kinds.py."""

import copy

import peft
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


def test_groups_are_refused():
    with pytest.raises(ConfigError, match="0 is a convolution of 2 groups, for which there is no OFT"):
        lorafx.compile(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), lorafx.OFTConfig(target_modules=["0"]))


def both(layer, folder, **fields):
    """PEFT's model and lorafx's with the same adapter, both to train."""
    base = nn.Sequential(layer).double()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.OFTConfig(target_modules=["0"], **fields))
    with torch.no_grad():
        theirs.base_model.model[0].oft_R.default.weight.normal_(std=0.1)
    theirs.save_pretrained(folder)
    return theirs, lorafx.load(base, folder, is_trainable=True, capture="sites")


def test_a_convolution_is_what_it_is_merged_to_in_peft(tmp_path):
    theirs, lora = both(nn.Conv2d(4, 6, 3, padding=1, stride=2), tmp_path, oft_block_size=4)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    expected = theirs.merge_and_unload()(x)
    torch.testing.assert_close(lora(x), expected, rtol=1e-10, atol=1e-10)
    assert (lora(x) - lora._lorafx.base(x)).abs().max() > 1e-3
    lora.merge_adapter()
    torch.testing.assert_close(lora(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("share", [True, False])
def test_constrained_turns_train_as_pefts(share, tmp_path):
    close = {"rtol": 1e-6, "atol": 1e-7}  # PEFT has the bound in float32
    fields = {"oft_block_size": 4, "coft": True, "eps": 0.2, "block_share": share}
    theirs, lora = both(nn.Linear(12, 5), tmp_path, **fields)
    x, models = torch.randn(7, 12, dtype=torch.float64), (lora, theirs)
    optimizers = [torch.optim.SGD((p for p in m.parameters() if p.requires_grad), 0.05) for m in models]
    for _ in range(4):
        losses = [model(x).square().mean() for model in models]
        torch.testing.assert_close(*losses, **close)
        for loss, optimizer in zip(losses, optimizers):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    lora.merge_adapter()
    torch.testing.assert_close(lora(x), theirs.merge_and_unload()(x), **close)
