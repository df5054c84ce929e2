"""A merge or an unmerge that fails half way leaves every weight as it was."""

import pytest
import torch
from merged_weights import bits, wide
from torch import nn

from lorafx.merging import ledger, steps


@pytest.fixture
def small_blocks(monkeypatch):
    """Weights of a dozen blocks."""
    monkeypatch.setattr(steps, "_ON_CPU", 10_000)


def failing(monkeypatch, model: nn.Module, fails_at: int) -> None:
    """Let the write of one block of a weight, by number, fail."""
    real, writes = torch.Tensor.copy_, iter(range(1, 100))
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def copy_(target, *args):
        if target.untyped_storage().data_ptr() in weights and next(writes) == fails_at:
            raise RuntimeError("out of memory")
        return real(target, *args)

    monkeypatch.setattr(torch.Tensor, "copy_", copy_)


@pytest.mark.parametrize("merged_before", [False, True])
@pytest.mark.parametrize("fails_at", [1, 3, 10])
def test_a_failure_half_way_leaves_every_weight_as_it_was(small_blocks, monkeypatch, merged_before, fails_at):
    model, lora = wide(torch.bfloat16)
    lora.add_adapter("b", {"r": 4, "target_modules": ["0", "2"], "init_lora_weights": False})
    if merged_before:
        lora.merge_adapter(["b"])
    before = bits(model)
    failing(monkeypatch, model, fails_at)
    with pytest.raises(RuntimeError, match="out of memory"):
        lora.merge_adapter(["default"])
    assert bits(model) == before
    assert lora.merged_adapters == (["b"] if merged_before else [])
    lora.merge_adapter(["default"])
    lora.unmerge_adapter()
    assert bits(model) == bits(wide(torch.bfloat16)[0])


@pytest.mark.parametrize("fails_at", [1, 4, 8, 12])
def test_a_failure_in_unmerging_leaves_it_merged(small_blocks, monkeypatch, fails_at):
    model, lora = wide(torch.bfloat16)
    original = bits(model)
    lora.merge_adapter()
    merged = bits(model)
    failing(monkeypatch, model, fails_at)
    with pytest.raises(RuntimeError):
        lora.unmerge_adapter()
    assert bits(model) == merged and lora.merged_adapters == ["default"]
    lora.unmerge_adapter()
    assert bits(model) == original


@pytest.mark.parametrize("step", ["merge", "unmerge"])
def test_an_interrupt_right_after_a_batch_was_written_is_undone_too(small_blocks, monkeypatch, step):
    model, lora = wide(torch.bfloat16)
    original = bits(model)
    if step == "unmerge":
        lora.merge_adapter()
    before, real = bits(model), getattr(ledger, step)

    def interrupted(*args, **kwargs):
        real(*args, **kwargs)
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(ledger, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        getattr(lora, f"{step}_adapter")()
    assert bits(model) == before and bool(lora.merged_adapters) == (step == "unmerge")
    with lora.disable_adapter():
        assert bits(model) == original
