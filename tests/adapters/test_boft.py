"""BOFT with several factors, which PEFT 0.21 has on CUDA alone; the rest is held to it in tests/peft/test_kinds.py."""

import pytest
import torch
from peft.tuners.boft.layer import BOFTLayer
from torch import nn

import lorafx
from lorafx.errors import ConfigError

CONFIG = lorafx.BOFTConfig(target_modules=["0"], init_weights=False)


def formula(layer, x, size, factors):
    """With PEFT's permutations as matrices, and a block-diagonal matrix for each factor."""
    a, n = layer.boft_R.default, layer.weight.shape[1]
    total, identity = torch.eye(n, dtype=a.dtype), torch.eye(size, dtype=a.dtype)
    for i in range(factors):
        order = BOFTLayer.block_butterfly_perm(None, n, n // size // 2**i, size // 2, factors - 1)
        p = torch.eye(n, dtype=a.dtype)[order]
        skew = (a[i] - a[i].mT) / 2
        total = p @ torch.block_diag(*((identity - skew) @ torch.linalg.inv(identity + skew))) @ p.T @ total
    return (x @ total @ layer.weight.T) * layer.boft_s.default.flatten() + layer.bias


@pytest.mark.parametrize(("size", "factors"), [(4, 1), (4, 2), (2, 3), (4, 3)])
def test_factors_after_one_another(size, factors):
    model, x = nn.Sequential(nn.Linear(16, 7)).double(), torch.randn(3, 5, 16, dtype=torch.float64)
    lora = lorafx.compile(model, CONFIG.replace(boft_block_size=size, boft_n_butterfly_factor=factors))
    expected = formula(lora[0], x, size, factors)
    torch.testing.assert_close(lora(x), expected, rtol=1e-12, atol=1e-12)
    trained = [p for p in lora.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(expected.square().sum(), trained)
    for ours, gradient in zip(torch.autograd.grad(lora(x).square().sum(), trained), wanted):
        torch.testing.assert_close(ours, gradient, rtol=1e-9, atol=1e-9)
    before = model[0].weight.clone()
    lora.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    lora.unmerge_adapter()
    assert torch.equal(model[0].weight, before)


def test_dropout_leaves_out_that_share_of_one_factors_blocks():
    model, x = nn.Sequential(nn.Linear(16, 7, bias=False)).double(), torch.eye(16, dtype=torch.float64)
    lora = lorafx.compile(model, CONFIG.replace(boft_dropout=0.5))
    with torch.no_grad():
        lora[0].boft_s.default.fill_(1)
    for _ in range(5):
        same = (lora.train()(x) - model(x)).abs().amax(1).view(4, 4) < 1e-12
        assert sorted(same.all(1).tolist()) == [False, False, True, True]
    assert (lora.eval()(x) - model(x)).abs().amax(1).min() > 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boft_block_num": 2}, "one of `boft_block_size` and `boft_block_num` must be 0"),
        ({"boft_n_butterfly_factor": 0}, "`boft_n_butterfly_factor` must be a positive int"),
        ({"boft_dropout": 1}, "`boft_dropout` must be a number in"),
    ],
)
def test_a_wrong_field_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        lorafx.BOFTConfig(**changes)


@pytest.mark.parametrize(
    ("layer", "changes", "message"),
    [
        (nn.Linear(10, 3), {}, "0 has 10 inputs, which are no whole number of blocks"),
        (nn.Linear(12, 3), {"boft_n_butterfly_factor": 2}, "0 has 12 inputs"),
        (nn.Embedding(8, 3), {}, "0 is an embedding"),
        (nn.Conv2d(8, 4, 3, groups=2), {}, "0 is a convolution of 2 groups"),
    ],
)
def test_what_it_cannot_act_on_is_refused(layer, changes, message):
    with pytest.raises(ConfigError, match=message):
        lorafx.compile(nn.Sequential(layer), CONFIG.replace(**changes))
