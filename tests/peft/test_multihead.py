"""nn.MultiheadAttention: PEFT's files, and what PEFT computes with them."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lorafx

CONFIG = {"r": 4, "lora_alpha": 6, "target_modules": ["inner"], "init_lora_weights": False}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.inner(x, y, y, need_weights=False)[0]


@pytest.mark.parametrize("bias", ["none", pytest.param("all", marks=pytest.mark.slow)])
def test_files_and_outputs_are_pefts(tmp_path, bias):
    torch.manual_seed(0)
    base, call = Attention(), (torch.randn(2, 5, 12), torch.randn(2, 7, 12))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**CONFIG, bias=bias))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lorafx.load(base, tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    written = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours")]
    assert written[0].keys() == written[1].keys()
    assert all(torch.equal(written[0][key], written[1][key]) for key in written[0])

    # PEFT 0.21 adds the ΔW of out_proj twice (its pull request 3774); here it adds it once.
    out_proj = theirs.base_model.model.inner.base_layer.out_proj
    out_proj.merge = out_proj.unmerge = lambda *args, **kwargs: None
    expected = theirs(*call)
    assert (ours(*call) - expected).abs().max() <= 1e-6 * expected.abs().max()
