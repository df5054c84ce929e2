"""A config picks the same modules here and in PEFT, and what PEFT refuses is refused."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import models
import peft
import pytest
import transformers
from cases import ATTENTION, file_key
from peft.tuners.lora import LoraLayer
from torch import nn

import lorafx

pytestmark = pytest.mark.slow  # real PEFT beside lorafx

HEADS = {"task_type": "SEQ_CLS"}


def spelled(value: object) -> str:
    """A test's name, the same in every process: sets in order, no quotes."""
    if isinstance(value, dict):
        value = {key: sorted(each) if isinstance(each, set) else each for key, each in value.items()}
    return str(value).replace("'", "")


SELECTIONS: list[tuple[str, dict[str, Any]]] = [
    *[(name, {"target_modules": "all-linear"}) for name in models.FACTORIES],
    *[(name, {"target_modules": None}) for name in ("llama", "gpt2", "bert", "t5")],
    ("llama", {"target_modules": "ALL-LINEAR"}),
    ("llama", {"target_modules": {"q_proj", "o_proj"}}),
    ("llama", {"target_modules": ["self_attn.q_proj"]}),
    ("llama", {"target_modules": ["model.layers.1.mlp.gate_proj"]}),
    ("llama", {"target_modules": ["1.mlp.gate_proj", "lm_head"]}),
    ("llama", {"target_modules": ["q_proj", "nothing"]}),
    ("llama", {"target_modules": "model.layers.0.mlp.up_proj"}),
    ("llama", {"target_modules": r".*_proj"}),
    ("llama", {"target_modules": r"model\.layers\.\d+\.mlp\.(up|down)_proj"}),
    ("llama", {"target_modules": r".*q_proj|lm_head"}),
    ("llama", {"target_modules": "all-linear", "exclude_modules": ["mlp.up_proj", "o_proj"]}),
    ("llama", {"target_modules": "all-linear", "exclude_modules": r".*\.1\..*"}),
    ("llama", {"target_modules": "all-linear", "exclude_modules": "up_proj"}),
    ("llama", {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["model.layers.0.self_attn.q_proj"]}),
    ("llama", {"target_modules": "all-linear", "modules_to_save": ["mlp"]}),
    ("llama", {"target_modules": "all-linear", "modules_to_save": ["layers.1"]}),
    ("llama", {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}),
    ("llama", {"target_modules": ATTENTION, "layers_to_transform": 1}),
    ("llama", {"target_modules": ATTENTION, "layers_to_transform": [0, 7]}),
    ("llama", {"target_modules": ATTENTION, "layers_to_transform": []}),
    ("llama", {"target_modules": ATTENTION, "layers_to_transform": [1], "layers_pattern": ["h", "layers"]}),
    ("llama", {"target_modules": ATTENTION, "layers_to_transform": [1], "layers_pattern": "model.layers"}),
    ("llama", {"target_modules": [*ATTENTION, "lm_head"], "layers_to_transform": [1]}),
    ("llama", {"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"], "layers_to_transform": [1]}),
    ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    ("gpt2", {"target_modules": ["c_proj"]}),
    ("gpt2", {"target_modules": ["attn.c_proj", "wte"]}),
    ("gpt2", {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": "h"}),
    ("gpt2", {"target_modules": r"transformer\.h\.\d\.mlp\.c_(fc|proj)"}),
    ("bert", {"target_modules": "all-linear", **HEADS}),
    ("bert", {"target_modules": ["dense"], **HEADS}),
    ("bert", {"target_modules": ["dense", "classifier"], **HEADS}),
    ("bert", {"target_modules": ["dense", "classifier"]}),
    ("bert", {"target_modules": ["output.dense"], "exclude_modules": ["attention.output.dense"]}),
    ("bert", {"target_modules": ["key"], "layers_to_transform": [0], "layers_pattern": "layer"}),
    ("t5", {"target_modules": ["q", "v"], "layers_to_transform": [0], "layers_pattern": "block"}),
    ("t5", {"target_modules": ["q", "v"], "layers_to_transform": [1]}),
    ("t5", {"target_modules": ["o", "v"]}),
    ("t5", {"target_modules": r"decoder\..*EncDecAttention\.k"}),
    ("vit", {"target_modules": ["projection", "query", "q_proj"]}),
    ("vit", {"target_modules": "all-linear", "modules_to_save": ["classifier"]}),
    ("convnet", {"target_modules": ["line", "space"]}),
    ("mlp", {"target_modules": ["down"]}),
]


@pytest.mark.parametrize(("name", "config"), SELECTIONS, ids=spelled)
def test_the_sites_are_the_modules_that_peft_adapts(name: str, config: dict[str, Any]) -> None:
    base = models.FACTORIES[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, **config))
        ours = lorafx.compile(base, lorafx.LoraConfig(r=2, **config))
    adapted = [n for n, m in theirs.base_model.model.named_modules() if isinstance(m, LoraLayer)]
    assert [site.name for site in ours.sites] == adapted


@pytest.mark.parametrize(("name", "config"), SELECTIONS[::3], ids=spelled)
def test_a_peft_config_object_and_its_dict_pick_the_same_sites(name: str, config: dict[str, Any]) -> None:
    base, made = models.FACTORIES[name](), peft.LoraConfig(r=2, **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = lorafx.compile(base, lorafx.LoraConfig(r=2, **config)).sites
        assert lorafx.compile(base, made).sites == expected
        assert lorafx.compile(base, made.to_dict()).sites == expected


UNFIT: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": ["proj"]}),
    ("llama", {"target_modules": "q_proj"}),
    ("llama", {"target_modules": []}),
    ("llama", {"target_modules": ["norm"]}),
    ("llama", {"target_modules": ["mlp"]}),
    ("llama", {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}),
    ("llama", {"target_modules": ["embed_tokens"], "layers_to_transform": [0]}),
    ("llama", {"target_modules": ["q_proj"], "lora_bias": True, "init_lora_weights": "gaussian"}),
    ("llama", {"target_modules": r".*q_proj", "layers_to_transform": [0]}),
    ("llama", {"target_modules": ["q_proj"], "layers_pattern": "layers"}),
    ("convnet", {"target_modules": ["plane"], "r": 3}),
    ("vit", {"target_modules": None}),
    ("mlp", {"target_modules": None}),
]


@pytest.mark.parametrize(("name", "config"), UNFIT, ids=spelled)
def test_what_peft_refuses_is_refused(name: str, config: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError, AttributeError)):
        peft.get_peft_model(models.FACTORIES[name](), peft.LoraConfig(**config))
    with pytest.raises(lorafx.errors.LorafxError):
        lorafx.compile(models.FACTORIES[name](), lorafx.LoraConfig(**config))


@pytest.mark.parametrize("task", ["QUESTION_ANS", "TOKEN_CLS", "SEQ_CLS", "CAUSAL_LM", "FEATURE_EXTRACTION"])
def test_the_heads_that_a_task_trains_are_those_of_peft(task: str) -> None:
    kinds = {"QUESTION_ANS": "QuestionAnswering", "TOKEN_CLS": "TokenClassification", "CAUSAL_LM": "LMHeadModel"}
    kind = kinds.get(task, "SequenceClassification" if task == "SEQ_CLS" else "Model")
    base = getattr(transformers, f"Bert{kind}" if kind in ("LMHeadModel", "Model") else f"BertFor{kind}")(
        models.bert(num_hidden_layers=1).config
    )
    config = {"task_type": task, "target_modules": ["query"]}  # not one object for both: PEFT changes what it is given
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config))
    ours = lorafx.compile(base, config)
    assert trained(ours) == trained(theirs)


def trained(model: nn.Module) -> set[str]:
    return {file_key(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
