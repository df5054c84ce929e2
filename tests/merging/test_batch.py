"""Batches: parameters by blocks, back again bit for bit, whoever multiplies and whatever happens half way."""

import pytest
import torch
from graphs import adapted
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorafx.errors import MergeError
from lorafx.merging import steps
from lorafx.merging.batch import batches, merge, original, unmerge
from lorafx.merging.entry import Entry, Target
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


def merged_entry(model: nn.Module, sources: tuple[Source, ...], **how) -> Entry:
    entry = Entry.of(model, Target("0.weight"), sources)
    merge(model, [entry], **how)
    return entry


LAYERS = [nn.Linear, nn.Embedding, lambda a, b: nn.Conv2d(a, b, (3, 2))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", LAYERS)
def test_each_block_comes_back(make, dtype):
    model, before, sources = made(make(61, 53), dtype, r=3)
    entry = merged_entry(model, sources)
    assert len(entry.kept["weight"]) > 3 and not torch.equal(model[0].weight, before)
    assert torch.equal(original(model, entry)["weight"], before)
    unmerge(model, [entry])
    assert torch.equal(model[0].weight, before)


def test_the_layout_of_a_weight_does_not_matter():
    layer = nn.Linear(61, 53)
    layer.weight = nn.Parameter(torch.randn(61, 53).t())
    model, before, sources = made(layer)
    entry = merged_entry(model, sources)
    unmerge(model, [entry])
    assert torch.equal(model[0].weight, before) and model[0].weight.stride() == (1, 53)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_another_number_of_threads_changes_nothing(dtype):
    """On some processors what a row of a product comes out as depends on how many rows are multiplied."""
    model, before, sources = made(nn.Linear(299, 1000), dtype, r=5)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        entry = merged_entry(model, sources)
        torch.set_num_threads(1)
        unmerge(model, [entry])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(model[0].weight, before)


def test_blocks_of_another_size_change_nothing(monkeypatch):
    model, _, sources = made(nn.Linear(61, 53))
    again, _, _ = made(nn.Linear(61, 53))
    again.load_state_dict(model.state_dict(), strict=False)
    merged_entry(model, sources)
    monkeypatch.setattr(steps, "_ON_CPU", 2**20)
    entry = merged_entry(again, sources)
    assert len(entry.kept["weight"]) == 1 and torch.equal(again[0].weight, model[0].weight)


def test_one_number_that_was_changed_is_seen_wherever_it_is():
    """A change so small that it vanishes beside ΔW is not: W comes back all the same."""
    model, before, sources = made(nn.Linear(61, 53))
    entry = merged_entry(model, sources)
    for row, column in ((0, 0), (20, 33), (52, 60)):
        merged = model[0].weight.detach().clone()
        model[0].weight.data[row, column] *= 1 + 2**-8
        changed = model[0].weight.detach().clone()
        with pytest.raises(MergeError, match=r"0\.weight cannot be restored exactly"):
            unmerge(model, [entry])
        assert torch.equal(model[0].weight, changed)
        model[0].weight.data.copy_(merged)
    unmerge(model, [entry])
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
        entry = merged_entry(model, sources)
        merged = model[0].weight.detach().clone()
        unmerge(model, [entry])
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
            merged_entry(model, (source,), safe=True)
    else:
        unmerge(model, [merged_entry(model, (source,))])
    assert torch.equal(model[0].weight, before)


def test_weights_are_alike_only_if_the_same_operators_work_on_them(monkeypatch):
    monkeypatch.setattr(steps, "_ON_CPU", 720)  # three weights of 12 × 20
    model = nn.ModuleDict({"a": nn.Linear(12, 20), "b": nn.Linear(12, 20), "other": nn.Linear(20, 12)})
    model.update({"turned": Conv1D(12, 20), "narrow": nn.Linear(12, 20, dtype=torch.bfloat16)})
    lora = adapted(model, target_modules=list(model), rank_pattern={"b": 2}, r=3)
    adapter = lora._lorafx.adapters["default"]
    entries = [Entry.of(lora, Target(site.weight), (Source.of(lora, adapter, site),)) for site in lora.sites]
    assert [len(batch) for batch in batches(lora, entries)] == [1] * 5
    layers = Layers(torch.float32)
    lora, entries = layers.lora, layers.entries
    assert [len(batch) for batch in batches(lora, entries)] == [3, 3, 1]
    merge(lora, entries[:1])
    monkeypatch.setattr(steps, "_ON_CPU", 120)
    merge(lora, entries[1:2])
    monkeypatch.setattr(steps, "_ON_CPU", 720)
    assert [len(batch) for batch in batches(lora, entries[:2])] == [1, 1], "one went by blocks, the other as a whole"


class Layers(nn.Module):
    """Seven weights of one shape, and what is merged into them."""

    def __init__(self, dtype):
        super().__init__()
        model = nn.Sequential(*(nn.Linear(12, 20, dtype=dtype) for _ in range(7)))
        names = [str(number) for number in range(7)]
        self.lora = adapted(model, target_modules=names, r=3)
        self.lora.add_adapter("second", {"r": 5, "target_modules": names, "init_lora_weights": False})
        adapters = self.lora._lorafx.adapters.values()
        self.entries = [
            Entry.of(self.lora, Target(site.weight), tuple(Source.of(self.lora, each, site) for each in adapters))
            for site in self.lora.sites
        ]
        self.weights = [self.lora.get_parameter(entry.target.path) for entry in self.entries]

    def values(self) -> list[torch.Tensor]:
        return [weight.detach().clone() for weight in self.weights]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_is_what_its_weights_are_one_by_one(monkeypatch, dtype):
    monkeypatch.setattr(steps, "_ON_CPU", 720)
    layers = Layers(dtype)
    before = layers.values()
    for entry in layers.entries:
        merge(layers.lora, [entry])
    expected = layers.values()
    assert all(not torch.equal(a, b) for a, b in zip(before, expected))
    for entry in layers.entries:
        unmerge(layers.lora, [entry])
    assert all(map(torch.equal, layers.values(), before))
    for entry in layers.entries:
        entry.kept.clear()
    for batch in batches(layers.lora, layers.entries):
        merge(layers.lora, batch)
    assert all(map(torch.equal, layers.values(), expected))
    assert torch.equal(original(layers.lora, layers.entries[4])["weight"], before[4])
    for batch in reversed(batches(layers.lora, layers.entries)):
        unmerge(layers.lora, batch)
    assert all(map(torch.equal, layers.values(), before))


def test_what_fails_in_a_batch_leaves_all_of_it_as_it_was(monkeypatch):
    monkeypatch.setattr(steps, "_ON_CPU", 2000)
    layers = Layers(torch.float32)
    before, bad = layers.values(), layers.entries[5].sources[1].tensors["lora_B.weight"]
    (batch,), good = batches(layers.lora, layers.entries), bad.clone()
    bad[4] = torch.nan
    with pytest.raises(MergeError, match=r"5\.weight that are not finite"):
        merge(layers.lora, batch, safe=True)
    assert all(map(torch.equal, layers.values(), before))
    bad.copy_(good)
    for entry in layers.entries:
        entry.kept.clear()
    merge(layers.lora, batch)
    after = layers.values()
    layers.weights[5].data[3, 7] += 1
    with pytest.raises(MergeError, match=r"5\.weight cannot be restored exactly"):
        unmerge(layers.lora, batch)
    layers.weights[5].data.copy_(after[5])
    assert all(map(torch.equal, layers.values(), after))
