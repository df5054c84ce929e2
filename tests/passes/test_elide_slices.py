"""elide_slices: what takes all is gone, what leaves something out stays."""

import pytest
import torch
from graphs import Chain, adapted, run, text
from torch import nn

from lorafx.passes import Canonicalize, ElideSlices


class Sliced(nn.Module):
    def forward(self, x):
        return x[:, None, :, 1:][:, :, :] + x[:, 1:2, None][..., ::2].sum()


def slices(gm):
    return [line.partition(" = ")[2] for line in text(gm) if " = slice.Tensor(" in line]


@pytest.mark.slow
def test_what_takes_all_is_gone():
    model = nn.Sequential(Chain(), Sliced())
    lora, x = adapted(model, target_modules=["first"]), torch.randn(5, 4, 4)
    before, after = run(lora, (Canonicalize(),), x), run(lora, (Canonicalize(), ElideSlices()), x)
    assert len(slices(before)) > 4
    everything = str(2**63 - 1)
    assert [each.partition(", ")[2] for each in slices(after)] == [
        f"3, 1, {everything})",
        "1, 1, 2)",
        f"3, 0, {everything}, 2)",
    ]
    assert torch.equal(after(x), before(x)) and torch.equal(after(x[:3]), before(x[:3]))


def test_what_is_written_through_a_slice_is_written():
    class Writing(nn.Module):
        def forward(self, x):
            y = x * 1
            y[:].mul_(2)
            return y

    lora, x = adapted(nn.Sequential(Chain(), Writing()), target_modules=["first"]), torch.randn(5, 4)
    gm = run(lora, (Canonicalize(), ElideSlices()), x)
    assert slices(gm) == [] and torch.equal(gm(x), run(lora, (Canonicalize(),), x)(x))
