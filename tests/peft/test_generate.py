"""generate(): token for token what PEFT's model with the same adapter file writes, through few captures."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
import zoo
from both import both
from torch import Tensor
from zoo.causal import ATTENTION, EXPERTS, GATED, SLIDING, UNGROUPED, causal
from zoo.entry import pretrained, sequences

import lorafx

TOKENS, MOST_CAPTURES = 128, 4
LONG = {"max_position_embeddings": 256}
MODELS = {
    "llama": causal("Llama", ATTENTION + GATED, **LONG),
    "qwen3": causal("Qwen3", ATTENTION + GATED, **LONG),
    # The window is longer than the prompt: it fills up while decoding.
    "gemma3": causal("Gemma3", ATTENTION + GATED, **LONG | SLIDING | {"sliding_window": 16}),
    "gpt2": pretrained("GPT2LMHeadModel", sequences, ["c_attn", "c_proj", "c_fc"], UNGROUPED | LONG | {"n_inner": 80}),
    "t5": zoo.ENTRIES["T5ForConditionalGeneration"],
    "mixtral": causal("Mixtral", [*ATTENTION, "lm_head"], **LONG, **EXPERTS, num_local_experts=4),
}
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


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(*both(MODELS[request.param], tmp_path_factory.mktemp("generate")))


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


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_it_writes_what_pefts_model_writes(pair: Pair, way: str) -> None:
    before = len(pair.ours.explain().calls)
    ours = written(pair.ours, way)
    assert torch.equal(ours, written(pair.theirs, way))
    assert ours.shape[1] >= TOKENS
    calls = pair.ours.explain().calls
    assert len(calls) - before <= MOST_CAPTURES, str(pair.ours.explain())
    assert {call.served_by for call in calls} == {"graph"}, str(pair.ours.explain())


@pytest.mark.slow
def test_the_adapter_has_a_say(pair: Pair) -> None:
    with pair.theirs.disable_adapter():
        without = written(pair.theirs, "sampling")
    assert not torch.equal(without, written(pair.theirs, "sampling"))
