"""generate(): token for token what PEFT's model with the same adapter file writes, through few captures."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import models
import peft
import pytest
import torch
from both import both
from torch import Tensor
from zoo.causal import ATTENTION, EXPERTS, GATED, SLIDING, UNGROUPED, causal
from zoo.encoders import T5, translator
from zoo.entry import pretrained, sequences

import lorafx

pytestmark = pytest.mark.slow  # real PEFT beside lorafx, many captures

TOKENS, MOST_CAPTURES = 24, 4
LONG = {"max_position_embeddings": 256}
MODELS = {
    "llama": causal("Llama", ATTENTION + GATED, **LONG),
    # The window is longer than the prompt: it fills up while decoding.
    "gemma3": causal("Gemma3", ATTENTION + GATED, **LONG | SLIDING | {"sliding_window": 16}),
    "gpt2": pretrained("GPT2LMHeadModel", sequences, ["c_attn", "c_proj", "c_fc"], UNGROUPED | LONG | {"n_inner": 80}),
    "t5": translator("T5", ["q", "k", "v", "o", "wi", "wo"], **T5 | {"num_layers": 1}),
    "mixtral": causal("Mixtral", [*ATTENTION, "lm_head"], **LONG, **EXPERTS, num_local_experts=4, num_hidden_layers=1),
}
# Each way of a plain decoder, and of each other model what it does otherwise: windows, positions, encoders, experts.
CASES = [
    *(("llama", way) for way in ("greedy", "beam search", "left-padded")),
    *(("gemma3", way) for way in ("greedy", "static cache")),
    *(("gpt2", way) for way in ("greedy",)),
    *(("t5", way) for way in ("sampling", "beam search")),
    *(("mixtral", way) for way in ("greedy",)),
]
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.5},
    "beam search": {"do_sample": False, "num_beams": 3},
    "left-padded": {"do_sample": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
}


@dataclass
class Pair:
    theirs: peft.PeftModel
    ours: lorafx.AdaptedModel


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """The pair of each model, made once, so that one way to generate finds what others have captured."""
    return functools.cache(lambda name: Pair(*both(MODELS[name], tmp_path_factory.mktemp("generate"))))


def prompts(padded: bool) -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        ids[0, :2], mask[0, :2] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def written(model: torch.nn.Module, way: str) -> Tensor:
    torch.manual_seed(0)
    length = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(**prompts(way == "left-padded"), **WAYS[way], **length)


@pytest.mark.parametrize(("pair", "way"), CASES)
def test_it_writes_what_pefts_model_writes(pairs: Callable[[str], Pair], pair: str, way: str) -> None:
    model = pairs(pair).ours
    before = len(model.explain().calls)
    ours = written(model, way)
    assert torch.equal(ours, written(pairs(pair).theirs, way))
    assert ours.shape[1] >= TOKENS
    calls = model.explain().calls
    assert len(calls) - before <= MOST_CAPTURES, str(model.explain())
    assert {call.served_by for call in calls} == {"graph"}, str(model.explain())


@pytest.mark.parametrize("pair", ["gpt2"])
def test_the_adapter_has_a_say(pairs: Callable[[str], Pair], pair: str) -> None:
    ours, theirs = pairs(pair).ours, pairs(pair).theirs
    with theirs.disable_adapter(), ours.disable_adapter():
        without = written(ours, "sampling")
        assert torch.equal(without, written(theirs, "sampling"))
    assert not torch.equal(without, written(ours, "sampling"))


def test_transformers_compiles_no_call():
    """With a static cache `generate` would, on a GPU: what is compiled is compiled by lorafx."""
    from transformers import CompileConfig

    lora = lorafx.compile(models.llama(), {"r": 2, "target_modules": ["q_proj"]}).eval()
    assert lora.get_compiled_call(CompileConfig()) == lora.__call__
