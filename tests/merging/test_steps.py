"""Steps: the same numbers, however many rows at a time, and whichever memory they are written into."""

import pytest
import torch
from graphs import adapted
from torch import nn

from lorafx.merging import steps as module
from lorafx.merging.scratch import Scratch, fresh
from lorafx.merging.source import Source
from lorafx.merging.steps import steps


def two_adapters() -> tuple[torch.Tensor, list[Source]]:
    lora = adapted(nn.Sequential(nn.Linear(21, 33)), r=3)
    lora.add_adapter("other", {"r": 5, "target_modules": ["0"], "init_lora_weights": False})
    (site,) = lora.sites
    return lora[0].weight.detach(), [Source.of(lora, adapter, site) for adapter in lora._lorafx.adapters.values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", [lambda: fresh, Scratch])
def test_blocks_and_their_parts_are_those_of_the_whole(monkeypatch, dtype, make):
    """A last block that is shorter, and parts of which some end with it; results are used before the next block."""
    weight, sources = two_adapters()
    weight = weight.to(dtype)
    like = torch.empty((), dtype=torch.promote_types(dtype, torch.float32)).expand(weight.shape)
    (whole,) = steps([sources], "weight", like, [slice(0, 33)], fresh)
    monkeypatch.setattr(module, "_IN_FLOAT64", 4 * 21)
    monkeypatch.setattr(module, "_ROWS", 1)
    rows = [slice(0, 14), slice(14, 28), slice(28, 33)]
    merged, unmerged = [], []
    for block, step in zip(rows, steps([sources], "weight", like, rows, make())):
        there = step.merged(weight[None, block])
        back = step.unmerged(weight[None, block])
        assert there.data_ptr() != back.data_ptr()
        merged.append(there.clone())
        unmerged.append(back.clone())
    assert torch.equal(torch.cat(merged, 1), whole.merged(weight[None]))
    assert torch.equal(torch.cat(unmerged, 1), whole.unmerged(weight[None]))
    assert not torch.equal(whole.merged(weight[None])[0], weight.to(like.dtype))


def test_scratch_is_the_same_memory_again_unless_it_is_too_small():
    scratch, cpu = Scratch(), torch.device("cpu")
    first = scratch("a", (4, 6), torch.float32, cpu)
    assert scratch("a", (3, 8), torch.float32, cpu).data_ptr() == first.data_ptr()
    assert scratch("a", (2, 3), torch.float32, cpu).shape == (2, 3)
    others = [scratch("b", (4, 6), torch.float32, cpu), scratch("a", (4, 6), torch.float64, cpu)]
    larger = scratch("a", (5, 6), torch.float32, cpu)
    assert first.data_ptr() not in {each.data_ptr() for each in (*others, larger)}
    assert scratch("a", (4, 6), torch.float32, cpu).data_ptr() == larger.data_ptr()
