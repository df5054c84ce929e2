"""padding: in evaluation an encoder of torch.nn gives zeros at padded positions, as torch's own kernel does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lorafx

AT_THE_END = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
AT_THE_START = AT_THE_END.flip(1)
OF_FLOATS = torch.zeros(2, 5).masked_fill(AT_THE_END, -torch.inf)


class Encoder(nn.Module):
    def __init__(self, norm_first=False, norm=None, **options):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 1, norm=norm, **options)

    def forward(self, x, **masks):
        return self.encoder(x, **masks)


@pytest.mark.parametrize("capture", ["graph", "sites"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow, id="plain"),
        pytest.param({"norm": nn.LayerNorm(8)}, id="a norm at the end"),
        pytest.param({"norm_first": True}, marks=pytest.mark.slow, id="norms first"),
        pytest.param({"enable_nested_tensor": False}, marks=pytest.mark.slow, id="no nested tensors"),
    ],
)
def test_evaluation_is_that_of_the_merged_model(options, capture):
    base, x = Encoder(**options).eval(), torch.randn(2, 5, 8)
    lora = lorafx.compile(base, {"r": 2, "target_modules": ["linear1"], "init_lora_weights": False}, capture=capture)
    merged = lorafx.compile(copy.deepcopy(base), {"r": 2, "target_modules": ["linear1"]}).eval()
    merged.load_state_dict(lora.state_dict())
    merged = merged.merge_and_unload()
    with torch.no_grad():
        for mask in (AT_THE_END, AT_THE_START, OF_FLOATS):
            expected = merged(x, src_key_padding_mask=mask)
            torch.testing.assert_close(lora.eval()(x, src_key_padding_mask=mask), expected)


def test_training_has_all_positions():
    model, x = Encoder(), torch.randn(2, 5, 8)
    lora = lorafx.compile(model, {"r": 2, "target_modules": ["linear1"]})
    torch.testing.assert_close(lora(x, src_key_padding_mask=AT_THE_END), model(x, src_key_padding_mask=AT_THE_END))


def test_who_switched_the_kernel_off_has_all_positions():
    model, x = Encoder().eval(), torch.randn(2, 5, 8)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            expected = model(x, src_key_padding_mask=AT_THE_END)
            lora = lorafx.compile(model, {"r": 2, "target_modules": ["linear1"]}).eval()
            torch.testing.assert_close(lora(x, src_key_padding_mask=AT_THE_END), expected)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert expected[1, 3:].any()
