"""Every model of the zoo: what lorafx computes with an adapter file is what PEFT computes with it.

`make models` runs this and writes docs/models.md from what each entry records: what served it, and how long it took.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import math
import time
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import zoo
from both import both
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo import plain

import lorafx
from lorafx.serving import early_calls

pytestmark = pytest.mark.slow  # real PEFT beside lorafx, many captures

SIZES = (2, 7), (3, 9)
# Entries that are also compared in eval mode, which is a capture more: one of each kind of code that asks for the mode.
EVALUATED = {
    *(entry.name for entry in plain.ENTRIES),
    *("LlamaForCausalLM", "Gemma3ForCausalLM", "MixtralForCausalLM", "GPT2LMHeadModel", "T5ForConditionalGeneration"),
    *("BertForSequenceClassification", "WhisperForConditionalGeneration", "ViTForImageClassification", "CLIPModel"),
}
EPS = torch.finfo(torch.float32).eps


@dataclass
class Outcome:
    """One training step: the loss, all floating-point outputs, and the adapters' gradients by file key."""

    loss: Tensor
    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]


@dataclass(eq=False)
class Pair:
    """A zoo entry with one adapter file, in PEFT and in lorafx."""

    entry: zoo.Entry
    theirs: peft.PeftModel
    ours: lorafx.AdaptedModel

    def step(self, model: nn.Module, size: tuple[int, int]) -> Outcome:
        model.train()
        model.zero_grad()
        inputs = self.entry.inputs(*size)
        output = call(model, inputs)
        loss = self.entry.loss(output, inputs)
        loss.backward()
        gradients = {file_key(name): p.grad for name, p in model.named_parameters() if p.requires_grad}
        return Outcome(loss.detach(), floats(output), gradients)

    def outputs(self, model: nn.Module, size: tuple[int, int]) -> list[Tensor]:
        """What a model gives: in eval mode without gradients, or as in training where that is not `EVALUATED`."""
        evaluates = self.entry.name in EVALUATED
        with torch.set_grad_enabled(not evaluates):
            return floats(call(model.train(not evaluates), self.entry.inputs(*size)))

    @functools.cache  # noqa: B019  (there are few pairs, and they live as long as the tests)
    def limit_of_outputs(self, size: tuple[int, int]) -> float:
        """1e-6, eight eps; where PEFT itself is further from the exact result than half of that, twice its distance.

        Two computations that are as good as each other, and not related, are no further apart. How far PEFT is, is the
        larger of two draws: as it is, and merged.
        """
        inputs = pytree.tree_map_only(
            Tensor, lambda x: x.double() if x.is_floating_point() else x, self.entry.inputs(*size)
        )
        try:
            with torch.no_grad():
                exact = floats(call(copy.deepcopy(self.theirs).eval().double(), inputs))
        except RuntimeError as error:
            assert "got Double" in str(error)  # grouped products of experts have no float64 kernel
            return 1e-6
        found = [self.outputs(self.theirs, size)]
        if all(site.groups == 1 for site in self.ours.sites):  # others cannot be merged
            merged = copy.deepcopy(self.theirs)
            merged.merge_adapter()
            found.append(self.outputs(merged, size))
        return max(1e-6, *(2 * distance(a, e) for each in found for a, e in zip(each, exact)))

    @cached_property
    def path_length(self) -> int:
        """Terms summed on the way from input to loss and back, every matrix passed both ways once."""
        leaves = [leaf for leaf in pytree.tree_leaves(self.entry.inputs(*SIZES[-1])) if isinstance(leaf, Tensor)]
        tokens = max(leaf.numel() for leaf in leaves)
        return tokens + sum(p[0].numel() + p.shape[0] for p in self.ours._lorafx.base.parameters() if p.ndim > 1)


@pytest.fixture(scope="module", params=zoo.ENTRIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    entry = zoo.ENTRIES[request.param]
    return Pair(entry, *both(entry, tmp_path_factory.mktemp("zoo"), is_trainable=True))


def call(model: nn.Module, inputs: zoo.Call) -> Any:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def floats(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output, caches left out: they are as deep in the tree as the model is."""
    if isinstance(output, dict):
        output = {key: value for key, value in output.items() if "cache" not in key and key != "past_key_values"}
    leaves = pytree.tree_leaves(dict(output) if isinstance(output, dict) else output)
    return [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def file_key(name: str) -> str:
    return name.replace(".base_layer", "").replace(".default", "").removeprefix("base_model.model.")


def distance(actual: Tensor, expected: Tensor) -> float:
    """How far the worst element is off, relative to the largest one."""
    largest = float(expected.double().abs().max())
    return float((actual.double() - expected.double()).abs().max()) / (largest or 1.0)


def assert_near(actual: list[Tensor], expected: list[Tensor], limit: float, what: str) -> None:
    assert [a.shape for a in actual] == [e.shape for e in expected], what
    worst = max(map(distance, actual, expected))
    assert worst <= limit, f"{what}: off by {worst:.3g} of the largest, limit {limit:.3g}"


def limit_of_gradients(pair: Pair) -> float:
    """λ · u · √n, five deviations of n independent roundings (Higham & Mary, SIAM J. Sci. Comput. 41(5), 2019)."""
    return 5 * EPS / 2 * math.sqrt(pair.path_length)


def test_it_computes_what_peft_computes(pair: Pair, record_property: Any) -> None:
    start = time.perf_counter()
    ours = pair.step(pair.ours, SIZES[0])
    seconds = time.perf_counter() - start
    theirs = pair.step(pair.theirs, SIZES[0])
    limit = pair.limit_of_outputs(SIZES[0])
    assert_near([ours.loss], [theirs.loss], limit, "loss")
    assert_near(ours.outputs, theirs.outputs, limit, "outputs")
    assert ours.gradients.keys() == theirs.gradients.keys()
    for key, expected in theirs.gradients.items():
        actual = ours.gradients[key]
        assert (actual is None or not actual.any()) == (expected is None or not expected.any()), key
        if expected is not None and actual is not None:
            assert_near([actual], [expected], limit_of_gradients(pair), key)

    for size in SIZES:
        actual, expected = pair.outputs(pair.ours, size), pair.outputs(pair.theirs, size)
        assert_near(actual, expected, pair.limit_of_outputs(size), f"outputs at {size}")

    pair.step(pair.ours, SIZES[1])
    served = pair.ours.explain().calls
    assert all(call.served_by == "graph" or call.reason for call in served)
    reason = next((call.reason for call in served if call.reason), "")
    record_property("zoo", (pair.entry.name, served[-1].served_by, len(pair.ours.sites), seconds, reason))


def test_merged_it_is_what_peft_merges(pair: Pair) -> None:
    """Merging rounds every weight once, and PEFT in another order. Where `EVALUATED`, the models compute the same."""
    before, evaluates = weights(pair.ours._lorafx.base), pair.entry.name in EVALUATED
    unmerged = pair.outputs(pair.ours, SIZES[0]) if evaluates else []
    if any(site.groups > 1 for site in pair.ours.sites):
        with pytest.raises(lorafx.errors.MergeError, match="groups"):
            pair.ours.merge_adapter()
        return
    pair.ours.merge_adapter()
    pair.theirs.merge_adapter()
    mine, other = weights(pair.ours._lorafx.base), weights(pair.theirs)
    merged = {name for name in mine if not torch.equal(mine[name], before[name])}
    assert merged == {name for name in mine if not torch.equal(other[name], before[name])} != set()
    rank = max(config.r for config in pair.ours.peft_config.values())
    for name in merged:  # a sum of r products, times the scaling, and the sum with the weight
        assert_near([mine[name]], [other[name]], (rank + 2) * EPS, name)
    if evaluates:
        outputs = pair.outputs(pair.ours, SIZES[0])
        assert_near(outputs, pair.outputs(pair.theirs, SIZES[0]), limit_of_gradients(pair), "merged, against PEFT")
        assert_near(outputs, unmerged, limit_of_gradients(pair), "merged, against unmerged")
    pair.ours.unmerge_adapter()
    pair.theirs.unmerge_adapter()
    after = weights(pair.ours._lorafx.base)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_saved_it_is_what_peft_saves(pair: Pair, tmp_path: Path) -> None:
    for model, name in ((pair.ours, "ours"), (pair.theirs, "theirs")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(tmp_path / name)
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    own = {key for key in theirs if ".lora_" in key}
    assert {key for key in ours if ".lora_" in key} == own and all(torch.equal(ours[key], theirs[key]) for key in own)
    again = peft.PeftModel.from_pretrained(pair.entry.build(), tmp_path / "ours")
    assert not peft.set_peft_model_state_dict(again, ours).unexpected_keys


WRITERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


@pytest.mark.parametrize("pair", [name for name in zoo.ENTRIES if name.endswith(WRITERS)], indirect=True)
def test_it_writes_what_peft_writes(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedily, three words, by the model's own Python: graphs of decoding have tests of their own."""
    monkeypatch.setattr(early_calls, "REPEATS", 1000)
    inputs = {name: value for name, value in pair.entry.inputs(*SIZES[0]).items() if name != "labels"}
    written = []
    for model in (pair.ours, pair.theirs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            written.append(model.eval().generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False))
    assert written[0].shape[1] >= 3 and torch.equal(*written)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters by their names in the base model, those that are tied by each."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {file_key(name): parameter.detach().clone() for name, parameter in parameters}
