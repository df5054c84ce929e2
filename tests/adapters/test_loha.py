"""LoHa with kernels that have factors of their own, of which PEFT 0.21 gives no derivative."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lorafx

CORE = lorafx.LoHaConfig(r=2, alpha=3, target_modules=["0"], use_effective_conv2d=True, init_weights=False)


def factor(layer, i):
    t, a, b = (getattr(layer, f"hada_{name}").default for name in (f"t{i}", f"w{i}_a", f"w{i}_b"))
    return torch.einsum("ijk,ip,jq->pqk", t.flatten(2), a, b)


@pytest.mark.parametrize("conv", [nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, (3, 1)), nn.Conv3d(4, 6, (1, 2, 1))], ids=repr)
def test_the_derivative_is_that_of_the_equation(conv):
    model = nn.Sequential(conv).double()
    lora = lorafx.compile(model, CORE)
    x = torch.randn(2, 4, *[5] * (conv.weight.ndim - 2), dtype=torch.float64)
    function = (F.conv1d, F.conv2d, F.conv3d)[conv.weight.ndim - 3]
    weight = conv.weight + 1.5 * (factor(lora[0], 1) * factor(lora[0], 2)).view(conv.weight.shape)
    expected = function(x, weight, conv.bias)
    torch.testing.assert_close(lora(x), expected, rtol=1e-12, atol=1e-12)
    trained = [p for p in lora.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(expected.square().sum(), trained)
    for ours, gradient in zip(torch.autograd.grad(lora(x).square().sum(), trained), wanted):
        torch.testing.assert_close(ours, gradient, rtol=1e-10, atol=1e-10)
