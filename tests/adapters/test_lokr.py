"""LoKr where PEFT 0.21 fails: kernels with factors of their own; and how sizes are divided."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lorafx
from lorafx.adapters.kinds.lokr import _divided
from lorafx.errors import ConfigError

CORE = lorafx.LoKrConfig(r=1, alpha=3, target_modules=["0"], use_effective_conv2d=True, init_weights=False)


@pytest.mark.parametrize("conv", [nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, (3, 1)), nn.Conv2d(8, 6, 3, groups=2)], ids=repr)
def test_a_kernel_with_factors_of_its_own(conv):
    model = nn.Sequential(conv).double()
    lora = lorafx.compile(model, CORE)
    layer, x = lora[0], torch.randn(2, conv.in_channels, *[5] * (conv.weight.ndim - 2), dtype=torch.float64)
    core, a, b = layer.lokr_t2.default, layer.lokr_w2_a.default, layer.lokr_w2_b.default
    d = torch.einsum("ijk,ip,jq->pqk", core.flatten(2), a, b)
    change = torch.stack([torch.kron(layer.lokr_w1.default, d[..., k]) for k in range(d.shape[-1])], -1)
    weight = conv.weight + 3 * change.view(conv.weight.shape)
    expected = (F.conv1d, F.conv2d)[conv.weight.ndim - 3](x, weight, conv.bias, groups=conv.groups)
    torch.testing.assert_close(lora(x), expected, rtol=1e-12, atol=1e-12)
    lora.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("size", "factor", "expected"),
    [
        (256, -1, (16, 16)),
        (128, -1, (8, 16)),
        (127, -1, (1, 127)),
        (128, 4, (4, 32)),
        (12, 5, (3, 4)),
        (12, 6, (6, 2)),
        (10, 3, (2, 5)),
        (100, 3, (2, 50)),
    ],
)
def test_sizes_are_divided_as_in_peft(size, factor, expected):
    from peft.tuners.lokr.layer import factorization

    assert _divided(size, factor) == expected == factorization(size, factor)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decompose_factor": 0}, "`decompose_factor` must be"),
        ({"decompose_both": 1}, "`decompose_both` must be"),
        ({"init_weights": "pissa"}, "`init_weights` must be"),
    ],
)
def test_a_wrong_field_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        lorafx.LoKrConfig(**changes)
