"""Models with an adapter that PEFT and lorafx are to agree about: what PEFT writes, and what both make of it."""

from __future__ import annotations

import contextlib
import copy
import warnings
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import models
import peft
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lorafx

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"


ONE_LAYER = {
    **{name: {"num_hidden_layers": 1} for name in ("llama", "bert", "vit")},
    "gpt2": {"n_layer": 1},
    "t5": {"num_layers": 1},
    "convnet": {},
}
TWO = {"num_hidden_layers": 2}


@dataclass(frozen=True)
class Case:
    """A base model (factory and its arguments; one layer unless they say more) and what PEFT puts on it."""

    model: str
    config: dict[str, Any]
    base: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    autocast: bool = False

    def make(self) -> nn.Module:
        return models.FACTORIES[self.model](**(ONE_LAYER[self.model] | self.base)).to(self.dtype)

    def peft_config(self) -> peft.LoraConfig:
        settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False} | self.config
        return peft.LoraConfig(**settings)

    def context(self) -> contextlib.AbstractContextManager:
        return torch.autocast("cpu", torch.bfloat16) if self.autocast else contextlib.nullcontext()

    @property
    def eps(self) -> float:
        return torch.finfo(torch.bfloat16 if self.autocast else self.dtype).eps


ATTENTION, MIXED = ["q_proj", "v_proj"], ["q_proj", "v_proj", "down_proj"]
SMALL_RANKS = {"rank_pattern": {"layers.1.self_attn.q_proj": 2, "v_proj": 3}, "alpha_pattern": {r".*\.0\..*v_proj": 5}}

CASES = {
    "llama all-linear": Case("llama", {"target_modules": "all-linear"}),
    "llama defaults": Case("llama", {"target_modules": None}),
    "llama rslora": Case("llama", {"target_modules": MIXED, "use_rslora": True}),
    "llama patterns": Case("llama", {"target_modules": MIXED, **SMALL_RANKS}, TWO),
    "llama patterns rslora": Case("llama", {"target_modules": MIXED, "use_rslora": True, **SMALL_RANKS}, TWO),
    "llama regex": Case("llama", {"target_modules": r".*\.1\..*(q|up)_proj"}, TWO),
    "llama exclude": Case(
        "llama", {"target_modules": ATTENTION, "exclude_modules": ["layers.0.self_attn.q_proj"]}, TWO
    ),
    "llama layers": Case("llama", {"target_modules": ATTENTION, "layers_to_transform": [1]}, TWO),
    "llama layers pattern": Case(
        "llama", {"target_modules": MIXED, "layers_to_transform": 0, "layers_pattern": "layers"}, TWO
    ),
    "llama embeddings": Case("llama", {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "llama embeddings regex": Case("llama", {"target_modules": r".*(embed_tokens|v_proj)"}),
    "llama saved head": Case("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "llama saved norms": Case("llama", {"target_modules": "all-linear", "modules_to_save": ["norm", "down_proj"]}),
    "llama tied, saved head": Case(
        "llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, {"tie_word_embeddings": True}
    ),
    "llama tied, saved embeddings": Case(
        "llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, {"tie_word_embeddings": True}
    ),
    "llama dropout": Case("llama", {"target_modules": MIXED, "lora_dropout": 0.3}),
    "llama gaussian": Case("llama", {"target_modules": MIXED, "init_lora_weights": "gaussian"}),
    "llama standard init": Case("llama", {"target_modules": MIXED, "init_lora_weights": True}),
    "llama bf16": Case("llama", {"target_modules": MIXED}, dtype=torch.bfloat16),
    "llama bf16 embeddings": Case("llama", {"target_modules": ["embed_tokens", "k_proj"]}, dtype=torch.bfloat16),
    "llama autocast": Case("llama", {"target_modules": MIXED}, autocast=True),
    "llama attention bias": Case(
        "llama", {"target_modules": MIXED, "bias": "lora_only", "lora_bias": True}, {"attention_bias": True}
    ),
    "gpt2 all-linear": Case("gpt2", {"target_modules": "all-linear", "fan_in_fan_out": True}),
    "gpt2 defaults": Case("gpt2", {"target_modules": None, "fan_in_fan_out": True}),
    "gpt2 bias all": Case("gpt2", {"target_modules": ["c_attn", "c_fc"], "bias": "all", "fan_in_fan_out": True}),
    "gpt2 bias lora_only": Case(
        "gpt2", {"target_modules": ["c_attn", "c_fc"], "bias": "lora_only", "fan_in_fan_out": True}
    ),
    "gpt2 lora_bias": Case("gpt2", {"target_modules": ["c_attn", "c_fc"], "lora_bias": True, "fan_in_fan_out": True}),
    "gpt2 dropout": Case("gpt2", {"target_modules": ["c_attn"], "lora_dropout": 0.2, "fan_in_fan_out": True}),
    "gpt2 positions": Case("gpt2", {"target_modules": ["wpe", "c_proj"], "fan_in_fan_out": False}),
    "gpt2 autocast": Case("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, autocast=True),
    "bert classification": Case("bert", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "bert all-linear": Case("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS", "bias": "all"}),
    "bert no task": Case("bert", {"target_modules": "all-linear"}),
    "bert defaults": Case("bert", {"target_modules": None, "modules_to_save": ["pooler"], "bias": "lora_only"}),
    "bert model dropout": Case(
        "bert", {"target_modules": ["query", "dense"], "lora_dropout": 0.1}, {"hidden_dropout_prob": 0.2}
    ),
    "t5 all-linear": Case("t5", {"target_modules": "all-linear"}),
    "t5 defaults": Case("t5", {"target_modules": None, "task_type": "SEQ_2_SEQ_LM"}),
    "t5 decoder layers": Case(
        "t5",
        {"target_modules": ["q", "wo"], "layers_to_transform": [1], "layers_pattern": ["block"]},
        {"num_layers": 2},
    ),
    "vit all-linear": Case("vit", {"target_modules": "all-linear"}),
    "vit saved classifier": Case(
        "vit", {"target_modules": ["q_proj", "v_proj", "projection"], "modules_to_save": ["classifier"]}
    ),
    "convnet": Case("convnet", {"target_modules": ["plane", "line", "space", "head"]}),
    "convnet options": Case(
        "convnet", {"target_modules": ["plane", "line", "head"], "lora_bias": True, "bias": "all", "lora_dropout": 0.2}
    ),
}

# Cases whose evaluation is compared too, which is a capture more.
EVALUATED = {"llama patterns rslora", "llama dropout", "convnet options"}


@dataclass(frozen=True)
class Outcome:
    """What one training step and one evaluation of a model gave; gradients by the key that files use."""

    logits: Tensor
    loss: Tensor | None
    gradients: dict[str, Tensor | None]
    evaluated: Tensor | None


@dataclass(frozen=True)
class Ran:
    """A case on both sides: the folders they wrote, the models that read PEFT's, and, when asked, their outcomes."""

    name: str
    base: nn.Module
    theirs_folder: Path
    ours_folder: Path
    peft: peft.PeftModel
    lora: lorafx.AdaptedModel

    @property
    def case(self) -> Case:
        return CASES[self.name]

    @cached_property
    def theirs(self) -> Outcome:
        return outcome(self.peft, self.case)

    @cached_property
    def ours(self) -> Outcome:
        return outcome(self.lora, self.case, evaluate=self.name in EVALUATED)

    @cached_property
    def exact(self) -> Outcome | None:
        """PEFT's outcome in float64, for cases that round to bfloat16."""
        if self.case.eps < 1e-6:
            return None
        return outcome(copy.deepcopy(self.peft).double(), replace(self.case, autocast=False))

    @cached_property
    def rounding(self) -> float:
        """How far PEFT's logits are from the exact ones, without dropout."""
        model, inputs = copy.deepcopy(self.peft).double().eval(), models.call(self.case.model)
        inputs = pytree.tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, inputs)
        with torch.no_grad():
            exact = models.logits(models.run(model, inputs))
        return largest(self.theirs.evaluated.double() - exact)


def made(name: str, folder: Path) -> Ran:
    """A case: PEFT makes the adapter and saves it, both load it, and lorafx saves it again."""
    case = CASES[name]
    base = case.make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written_by_peft(base, case.peft_config(), folder / "theirs")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "theirs", is_trainable=True)
        ours = lorafx.load(copy.deepcopy(base), folder / "theirs", is_trainable=True)
        ours.save_pretrained(folder / "ours")
    return Ran(name, base, folder / "theirs", folder / "ours", theirs, ours)


def written_by_peft(base: nn.Module, config: peft.LoraConfig, folder: Path) -> None:
    """Have PEFT make an adapter on a copy of `base` and save it."""
    torch.manual_seed(3)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():  # saved modules and biases start as the base's: make them differ
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(folder)


def outcome(model: nn.Module, case: Case, evaluate: bool = True) -> Outcome:
    """Run one training step and, if asked, an evaluation."""
    model.zero_grad()
    inputs = models.call(case.model)
    model.train()
    torch.manual_seed(5)
    with case.context():
        output = models.run(model, inputs)
    scores = models.logits(output)
    loss = getattr(output, "loss", None)
    weights = torch.randn(scores.shape, generator=torch.Generator().manual_seed(6))
    (scores * weights).sum().backward() if loss is None else loss.backward()
    gradients = {file_key(n): p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.eval()
    with torch.no_grad(), case.context():
        evaluated = models.logits(models.run(model, inputs)) if evaluate else None
    return Outcome(scores.detach(), None if loss is None else loss.detach(), gradients, evaluated)


def file_key(name: str) -> str:
    """A parameter's name in either model, as one key: wrappers and the adapter's name left out."""
    for part in (".modules_to_save.default", ".trained_bias.default", ".base_layer", ".default"):
        name = name.replace(part, "")
    return name.removeprefix(PREFIX)


def assert_within(actual: Tensor, expected: Tensor, limit: float, what: str) -> None:
    """Same shape and dtype, and no element further off than `limit`."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), what
    distance = largest(actual.double() - expected.double())
    assert distance <= limit, f"{what}: off by {distance:.3g}, limit {limit:.3g}, largest {largest(expected):.3g}"


def largest(tensor: Tensor) -> float:
    return float(tensor.double().abs().max())
