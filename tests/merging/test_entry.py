"""Entries: a parameter by blocks, back again bit for bit, whoever multiplies and whatever happens half way."""

import pytest
import torch
from graphs import adapted
from torch import nn

from lorafx.errors import MergeError
from lorafx.merging import steps
from lorafx.merging.entry import Target, merge
from lorafx.merging.source import Source

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of a few rows, of which the last is shorter."""
    monkeypatch.setattr(steps, "_ON_CPU", 350)


def made(layer: nn.Module, dtype=torch.float32, **config) -> tuple[nn.Module, torch.Tensor, tuple[Source, ...]]:
    model = nn.Sequential(layer).to(dtype)
    lora = adapted(model, target_modules=["0"], **config)
    adapter, (site,) = lora._lorafx.adapters["default"], lora.sites
    return model, layer.weight.detach().clone(), (Source.of(lora, adapter, site),)


LAYERS = [nn.Linear, nn.Embedding, lambda a, b: nn.Conv2d(a, b, (3, 2))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", LAYERS)
def test_each_block_comes_back(make, dtype):
    model, before, sources = made(make(61, 53), dtype, r=3)
    entry = merge(model, Target("0.weight"), sources)
    assert len(entry.kept["weight"]) > 3 and not torch.equal(model[0].weight, before)
    assert torch.equal(entry.original(model)["weight"], before)
    entry.unmerge(model)
    assert torch.equal(model[0].weight, before)


def test_the_layout_of_a_weight_does_not_matter():
    layer = nn.Linear(61, 53)
    layer.weight = nn.Parameter(torch.randn(61, 53).t())
    model, before, sources = made(layer)
    entry = merge(model, Target("0.weight"), sources)
    entry.unmerge(model)
    assert torch.equal(model[0].weight, before) and model[0].weight.stride() == (1, 53)


def test_another_number_of_threads_changes_nothing():
    model, before, sources = made(nn.Linear(256, 300), r=8)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        entry = merge(model, Target("0.weight"), sources)
        torch.set_num_threads(1)
        entry.unmerge(model)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(model[0].weight, before)


def test_blocks_of_another_size_change_nothing(monkeypatch):
    model, _, sources = made(nn.Linear(61, 53))
    again, _, _ = made(nn.Linear(61, 53))
    again.load_state_dict(model.state_dict(), strict=False)
    merge(model, Target("0.weight"), sources)
    monkeypatch.setattr(steps, "_ON_CPU", 2**20)
    entry = merge(again, Target("0.weight"), sources)
    assert len(entry.kept["weight"]) == 1 and torch.equal(again[0].weight, model[0].weight)


def test_one_number_that_was_changed_is_seen_wherever_it_is():
    """A change so small that it vanishes beside ΔW is not: W comes back all the same."""
    model, before, sources = made(nn.Linear(61, 53))
    entry = merge(model, Target("0.weight"), sources)
    for row, column in ((0, 0), (20, 33), (52, 60)):
        merged = model[0].weight.detach().clone()
        model[0].weight.data[row, column] *= 1 + 2**-8
        changed = model[0].weight.detach().clone()
        with pytest.raises(MergeError, match=r"0\.weight cannot be restored exactly"):
            entry.unmerge(model)
        assert torch.equal(model[0].weight, changed)
        model[0].weight.data.copy_(merged)
    entry.unmerge(model)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("fails_at", range(0, 15, 4))
def test_an_interrupt_after_a_write_is_undone_too(monkeypatch, fails_at):
    """Ctrl-C may come between a write and whatever notes it."""
    model, before, sources = made(nn.Linear(61, 53))
    real, writes, address = torch.Tensor.copy_, iter(range(100)), model[0].weight.untyped_storage().data_ptr()

    def copy_(target, *args):
        result = real(target, *args)
        if target.untyped_storage().data_ptr() == address and next(writes) == fails_at:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    entry = None
    try:
        entry = merge(model, Target("0.weight"), sources)
        merged = model[0].weight.detach().clone()
        entry.unmerge(model)
    except KeyboardInterrupt:
        assert torch.equal(model[0].weight, merged if entry else before)
    else:
        assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("safe", [False, True])
def test_only_a_safe_merge_refuses_what_is_not_finite(safe):
    model, before, (source,) = made(nn.Linear(61, 53))
    source.tensors["lora_B.weight"][40] = torch.inf
    if safe:
        with pytest.raises(MergeError, match="not finite"):
            merge(model, Target("0.weight"), (source,), safe=True)
    else:
        merge(model, Target("0.weight"), (source,)).unmerge(model)
    assert torch.equal(model[0].weight, before)
