"""changes: what adapters make of each tensor, asked of a model without numbers, and made of rows at a time."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn

import lorafx
from lorafx.adapters.kinds import LoraConfig
from lorafx.adapters.planning import plan
from lorafx.errors import AdapterError, MergeError
from lorafx.merging import steps
from lorafx.merging.changes import Change, Values, changes_of, rounded
from lorafx.tree.lookup import tensor_at


def values(root: nn.Module, name: str = "default", seed: int = 0, **settings: Any) -> Values:
    """A planned adapter with random tensors."""
    config = {"r": 4, "lora_alpha": 6} | settings
    adapter = plan(root, name, LoraConfig(**config))
    rng = torch.Generator().manual_seed(seed)
    shapes = {
        adapter.tensors[site.name][spec.suffix]: spec.shape
        for site in adapter.selection
        for spec in adapter.kind.tensors(site, adapter.config).values()
    }
    shapes |= {path: tuple(tensor_at(root, base).shape) for base, path in adapter.replaced.items()}
    return Values(adapter, {path: torch.randn(shape, generator=rng) for path, shape in shapes.items()}, {})


def merged(change: Change, weight: Tensor) -> Tensor:
    read = lambda start, stop: weight[start:stop] if weight.dim() else weight  # noqa: E731
    return torch.cat([*change.blocks(read, tuple(weight.shape), weight.dtype, "it")])


def on_meta(model: nn.Module) -> nn.Module:
    return model.to("meta")


def test_a_models_numbers_are_not_asked_for():
    root = on_meta(models.llama())
    lora = values(root, target_modules=["q_proj"])
    found = changes_of(root, [lora])
    assert set(found) == {f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1)}
    weight = torch.randn(64, 48)
    a, b = (lora.tensors[f"model.layers.0.self_attn.q_proj.lora_{x}.default.weight"].double() for x in "AB")
    expected = (weight.double() + (b @ a) * 1.5).float()
    close = {"rtol": 0, "atol": 2**-22 * float(expected.abs().max())}  # the change is rounded, then the sum
    torch.testing.assert_close(merged(found["model.layers.0.self_attn.q_proj.weight"], weight), expected, **close)


@pytest.mark.parametrize("block", [1, 100, 48 * 5])
@pytest.mark.parametrize(
    ("make", "target", "weight"),
    [
        (models.llama, "q_proj", "model.layers.0.self_attn.q_proj.weight"),
        (models.llama, "embed_tokens", "model.embed_tokens.weight"),
        (models.gpt2, "c_fc", "transformer.h.0.mlp.c_fc.weight"),
        (models.vit, "projection", "vit.embeddings.patch_embeddings.projection.weight"),
    ],
    ids=["linear", "embedding", "conv1d", "convolution"],
)
def test_rows_are_merged_as_the_whole_is(monkeypatch, make, target, weight, block):
    model = make()
    tensor = model.get_parameter(weight).detach()
    change = changes_of(model, [values(model, target_modules=[target])])[weight]
    whole = merged(change, tensor)
    monkeypatch.setattr(steps, "_ON_CPU", block)
    asked = []

    def read(start, stop):
        asked.append((start, stop))
        return tensor[start:stop]

    rows = list(change.blocks(read, tuple(tensor.shape), tensor.dtype, "it"))
    assert len(rows) > 4 and torch.equal(torch.cat(rows), whole) and not torch.equal(whole, tensor)
    assert [a for a, _ in asked] == [0, *(b for _, b in asked[:-1])] and asked[-1][1] == len(tensor)


def test_a_kind_that_needs_all_rows_is_given_them(monkeypatch):
    model = models.llama(num_hidden_layers=1)
    change = changes_of(model, [values(model, target_modules=["q_proj"])])["model.layers.0.self_attn.q_proj.weight"]
    monkeypatch.setattr(steps, "_ON_CPU", 1)
    monkeypatch.setattr(type(change.sources[0].adapter.kind), "additive", False)
    weight = torch.randn(64, 48)
    assert len(list(change.blocks(lambda a, b: weight[a:b], (64, 48), torch.float32, "it"))) == 1


def test_a_copy_goes_before_what_is_merged_and_has_it_merged_into_it():
    model = on_meta(models.llama(num_hidden_layers=1))
    saves = values(model, "saves", target_modules=["up_proj"], modules_to_save=["lm_head"])
    other = values(model, "other", target_modules=["lm_head"])
    change = changes_of(model, [saves, other])["lm_head.weight"]
    copy = saves.tensors["lm_head.modules_to_save.saves.weight"]
    assert torch.equal(change.own, copy) and len(change.sources) == 1
    a, b = (other.tensors[f"lm_head.lora_{x}.other.weight"].double() for x in "AB")
    expected = (copy.double() + 1.5 * b @ a).float()
    close = {"rtol": 0, "atol": 2**-22 * float(expected.abs().max())}
    torch.testing.assert_close(merged(change, torch.full_like(copy, float("nan"))), expected, **close)


def test_tied_names_share_a_change_until_one_has_a_copy():
    model = models.llama(num_hidden_layers=1, tie_word_embeddings=True)
    together = changes_of(model, [values(model, target_modules=["lm_head"])])
    assert together["lm_head.weight"] is together["model.embed_tokens.weight"]
    apart = changes_of(model, [values(model, target_modules=["q_proj"], modules_to_save=["lm_head"])])
    assert "model.embed_tokens.weight" not in apart and apart["lm_head.weight"].own is not None


def test_a_module_of_two_names_is_replaced_under_both():
    inner = nn.Linear(3, 5)
    model = nn.ModuleDict({"first": nn.Linear(3, 4), "one": inner, "two": inner})
    found = changes_of(model, [values(model, target_modules=["first"], modules_to_save=["one"])])
    assert found["one.weight"] is found["two.weight"] and found["one.bias"].own is not None


def test_buffers_of_a_saved_module_are_replaced_too():
    model = nn.ModuleDict({"first": nn.Linear(3, 4), "norm": nn.BatchNorm1d(4)})
    found = changes_of(model, [values(model, target_modules=["first"], modules_to_save=["norm"])])
    assert {"norm.running_mean", "norm.num_batches_tracked", "norm.weight"} < found.keys()


def test_two_copies_of_one_tensor_are_refused():
    model = models.llama(num_hidden_layers=1)
    both = [values(model, name, target_modules=["q_proj"], modules_to_save=["norm"]) for name in ("one", "two")]
    with pytest.raises(AdapterError, match="'one' and 'two' cannot be merged together: each has its own"):
        changes_of(model, both)


def test_a_site_that_cannot_be_merged_is_refused():
    model = nn.ModuleDict({"conv": nn.Conv1d(4, 8, 3, groups=2)})
    with pytest.raises(MergeError, match="groups=2"):
        changes_of(model, [values(model, target_modules=["conv"])])


def test_numbers_become_infinite_in_no_silence():
    assert rounded(torch.tensor([1e4]), torch.float16, "it").item() == 1e4
    assert rounded(torch.tensor([1e5, float("inf")]), torch.float16, "it").isinf().all()  # it was so before
    with pytest.raises(MergeError, match=r"it holds numbers too large for torch\.float16"):
        rounded(torch.tensor([1.0, -1e5]), torch.float16, "it")
    assert rounded(torch.tensor([]), torch.float16, "it").shape == (0,)
    assert rounded(torch.tensor([3]), torch.int64, "it").item() == 3


def test_merging_in_memory_gives_the_same():
    base = models.llama(attention_bias=True)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config = {"target_modules": "all-linear", "bias": "all", "lora_bias": True, "init_lora_weights": False}
    lora = lorafx.compile(base, config | {"target_modules": ["q_proj", "o_proj", "embed_tokens"], "lora_bias": False})
    adapter = lorafx.of(lora)._lorafx.adapters["default"]
    tensors = {path: tensor_at(lorafx.of(lora).tree, path).detach() for path in adapter.paths}
    found = changes_of(models.llama(attention_bias=True).to("meta"), [Values(adapter, tensors, {})])
    lora.merge_and_unload()
    for name, tensor in base.state_dict().items():
        expected = merged(found[name], before[name]) if name in found else before[name]
        assert torch.equal(tensor, expected), name
