"""The same adapter file gives the same numbers here and in PEFT, run in one process; and each reads the other's files.

A case is a model and a `peft.LoraConfig`. PEFT makes the adapter and saves it, both load it, and both make one training
step from the same random seed; what came of that is computed once a case and compared by several small tests.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import models
import peft
import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lorafx
from lorafx.testing import assert_same_tensors

pytestmark = pytest.mark.slow  # real PEFT beside lorafx, many captures: left out of `make test-fast`

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
LAMBDA = 5  # deviations allowed, as in lorafx.testing


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

# Cases whose numbers are compared; of the others, which differ only in what they select, only files are. A case costs a
# capture, and one whose evaluation is compared too costs a second.
NUMERIC = [
    "llama all-linear",
    "llama patterns rslora",
    "llama embeddings",
    "llama saved norms",
    "llama tied, saved head",
    "llama tied, saved embeddings",
    "llama dropout",
    "llama gaussian",
    "llama bf16",
    "llama autocast",
    "llama attention bias",
    "gpt2 all-linear",
    "gpt2 bias all",
    "bert all-linear",
    "bert defaults",
    "t5 defaults",
    "vit saved classifier",
    "convnet",
    "convnet options",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in (
            "llama patterns",
            "llama rslora",
            "llama layers pattern",
            "llama saved head",
            "llama bf16 embeddings",
            "gpt2 autocast",
            "gpt2 bias lora_only",
            "gpt2 lora_bias",
            "gpt2 dropout",
            "gpt2 positions",
            "bert model dropout",
            "t5 all-linear",
            "t5 decoder layers",
            "vit all-linear",
        )
    ),
]
EVALUATED = {"llama patterns rslora", "llama dropout", "convnet options"}
numeric = pytest.mark.parametrize("ran", NUMERIC, indirect=True)


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


@pytest.fixture(scope="module", params=CASES)
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    case, folder = CASES[request.param], tmp_path_factory.mktemp("parity")
    base = case.make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written_by_peft(base, case.peft_config(), folder / "theirs")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "theirs", is_trainable=True)
        ours = lorafx.load(copy.deepcopy(base), folder / "theirs", is_trainable=True)
        ours.save_pretrained(folder / "ours")
    return Ran(request.param, base, folder / "theirs", folder / "ours", theirs, ours)


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


def path_length(model: nn.Module, inputs: Any) -> int:
    """Terms summed one after another on the way from input to loss and back: the longest chain's reduction lengths.

    A matrix is passed forwards (its input width) and backwards (its output width), and the gradient of a weight sums
    over tokens; every matrix is counted as though all were passed in turn, which the residual stream only bounds.
    """
    leaves = inputs.values() if isinstance(inputs, dict) else inputs
    tokens = max(leaf.numel() for leaf in leaves)
    return tokens + sum(p[0].numel() + p.shape[0] for p in model.parameters() if p.ndim > 1)


def assert_within(actual: Tensor, expected: Tensor, limit: float, what: str) -> None:
    """Same shape and dtype, and no element further off than `limit`."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), what
    distance = largest(actual.double() - expected.double())
    assert distance <= limit, f"{what}: off by {distance:.3g}, limit {limit:.3g}, largest {largest(expected):.3g}"


def largest(tensor: Tensor) -> float:
    return float(tensor.double().abs().max())


def limit_of_logits(ran: Ran, expected: Tensor, exact: Tensor | None) -> float:
    """Twice the distance of PEFT from the exact result, and in float32 at least eight eps, 1e-6 of the largest.

    Two computations that are as good as each other, and not related, are no further apart than that.
    """
    return max(1e-6 * largest(expected), 2 * ran.rounding) if exact is None else 2 * largest(expected.double() - exact)


def limit_of_loss(ran: Ran, expected: Tensor, exact: Tensor | None) -> float:
    """As of logits, and at least two deviations of PEFT's: its loss, one number, may be near the exact one by chance.

    A token's loss is a difference of logits, which are off by their root mean square; a loss is the mean of n of them.
    """
    limit = limit_of_logits(ran, expected, exact)
    if exact is None:
        return limit
    off = ran.theirs.logits.double() - ran.exact.logits
    tokens = off.numel() / off.shape[-1]
    return max(limit, 2 * float(off.square().mean().sqrt()) * math.sqrt(2 / tokens))


def limit_of_gradient(ran: Ran, expected: Tensor, exact: Tensor | None) -> float:
    """The limit for a gradient that is as large as `expected`.

    λ · u · √n of the largest: n roundings of u = eps / 2 each, independent, λ = 5 deviations; bfloat16 as above.

    n is `path_length`, the number of terms summed on the way (Higham & Mary, SIAM J. Sci. Comput. 41(5), 2019).
    """
    if exact is not None:
        return 2 * largest(expected.double() - exact)
    length = path_length(ran.base, models.call(ran.case.model))
    return LAMBDA * ran.case.eps / 2 * math.sqrt(length) * largest(expected)


# --- the same numbers ------------------------------------------------------------------------------------------------


@numeric
def test_training_gives_the_same_logits_and_loss(ran: Ran) -> None:
    for what, limit in (("logits", limit_of_logits), ("loss", limit_of_loss)):
        ours, theirs, exact = (getattr(o, what, None) for o in (ran.ours, ran.theirs, ran.exact))
        if theirs is not None:
            assert_within(ours, theirs, limit(ran, theirs, exact), what)


@pytest.mark.parametrize("ran", sorted(EVALUATED), indirect=True)
def test_evaluation_gives_the_same_logits(ran: Ran) -> None:
    exact = ran.exact.evaluated if ran.exact else None
    assert_within(ran.ours.evaluated, ran.theirs.evaluated, limit_of_logits(ran, ran.theirs.evaluated, exact), "logits")


@numeric
def test_the_adapter_changes_the_logits_far_more_than_the_limit(ran: Ran) -> None:
    if ran.case.config.get("init_lora_weights"):
        pytest.skip("this adapter starts at B = 0")
    with torch.no_grad(), ran.case.context():
        plain = models.logits(models.run(ran.base.eval(), models.call(ran.case.model)))
    exact = ran.exact.evaluated if ran.exact else None
    change = largest(ran.theirs.evaluated.double() - plain.double())
    assert change > 5 * limit_of_logits(ran, ran.theirs.evaluated, exact)


@numeric
def test_training_gives_the_same_adapter_gradients(ran: Ran) -> None:
    ours, theirs = ran.ours.gradients, ran.theirs.gradients
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        if expected is None or not expected.any():
            assert ours[key] is None or not ours[key].any(), key
        else:
            exact = ran.exact.gradients[key] if ran.exact else None
            # Softmax does not see a key's bias, so that gradient is 0 but for rounding at the scale of the query's.
            measure = theirs[key.replace(".key.bias", ".query.bias")]
            assert_within(ours[key], expected, limit_of_gradient(ran, measure, exact), key)


@numeric
def test_some_gradient_is_not_zero(ran: Ran) -> None:
    assert any(gradient is not None and gradient.any() for gradient in ran.ours.gradients.values())


# --- the same files --------------------------------------------------------------------------------------------------


def test_what_was_read_is_written_back_tensor_for_tensor(ran: Ran) -> None:
    assert_same_tensors(load_file(ran.ours_folder / WEIGHTS), meant(load_file(ran.theirs_folder / WEIGHTS)))


def meant(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's file without what its `bias="all"` sweeps up from inside its own wrappers; it never reads that again."""
    stray = (".modules_to_save.", ".original_module.")
    return {key: tensor for key, tensor in tensors.items() if not any(part in key for part in stray)}


def test_what_was_read_is_written_back_field_for_field(ran: Ran) -> None:
    ours, theirs = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (ran.ours_folder, ran.theirs_folder)
    )
    for config in (ours, theirs):
        for key in ("target_modules", "exclude_modules", "modules_to_save"):  # PEFT writes some of them as sets
            config[key] = sorted(config[key]) if isinstance(config[key], list) else config[key]
    assert ours == theirs


def test_peft_reads_what_lorafx_wrote(ran: Ran) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(ran.base), ran.ours_folder).eval()
    assert not [str(w.message) for w in caught if "missing" in str(w.message).lower()]
    with torch.no_grad(), ran.case.context():
        actual = models.logits(models.run(again, models.call(ran.case.model)))
        assert torch.equal(actual, models.logits(models.run(ran.peft.eval(), models.call(ran.case.model))))


def test_peft_finds_no_key_missing_or_unexpected_in_what_lorafx_wrote(ran: Ran) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(ran.base), ran.theirs_folder)
        result = peft.set_peft_model_state_dict(again, load_file(ran.ours_folder / WEIGHTS))
    assert not result.unexpected_keys
    own = ("lora_", ".modules_to_save.default.")
    assert not [key for key in result.missing_keys if any(part in key for part in own)]


@pytest.mark.parametrize("name", CASES)
def test_peft_reads_and_writes_back_what_lorafx_made(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base, config = case.make(), case.peft_config()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lorafx.compile(copy.deepcopy(base), config, random_state=7).save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
        theirs.save_pretrained(tmp_path / "theirs")
    assert not [str(w.message) for w in caught if "missing" in str(w.message).lower()]
    assert_same_tensors(load_file(tmp_path / "ours" / WEIGHTS), meant(load_file(tmp_path / "theirs" / WEIGHTS)))


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


def test_the_trainable_parameter_line_is_pefts(ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    ran.peft.print_trainable_parameters()
    theirs = capsys.readouterr().out
    ran.lora.print_trainable_parameters()
    assert capsys.readouterr().out == theirs


# --- the same sites --------------------------------------------------------------------------------------------------

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


# --- several adapters ------------------------------------------------------------------------------------------------

SECOND = {"target_modules": ["q_proj", "up_proj"], "r": 3, "lora_alpha": 9, "init_lora_weights": False}
FIRST = {"target_modules": ATTENTION, "r": 4, "lora_alpha": 6, "init_lora_weights": False}


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[peft.PeftModel, lorafx.AdaptedModel]]:
    """PEFT's model with two adapters, and ours with the same two read from PEFT's folders."""
    torch.manual_seed(4)
    theirs = peft.get_peft_model(models.llama(**ONE_LAYER["llama"]), peft.LoraConfig(**FIRST)).eval()
    theirs.add_adapter("second", peft.LoraConfig(**SECOND))
    theirs.save_pretrained(tmp_path)
    ours = lorafx.load(models.llama(**ONE_LAYER["llama"]), tmp_path)
    ours.load_adapter(tmp_path / "second", "second")
    yield theirs, ours


def assert_same_logits(ours: nn.Module, theirs: nn.Module) -> None:
    inputs = models.call("llama")
    expected = theirs(**inputs).logits
    assert_within(ours(**inputs).logits, expected, 1e-6 * largest(expected), "logits")


@torch.no_grad()
@pytest.mark.parametrize("active", [["default"], ["second"], ["default", "second"], ["second", "default"]], ids=str)
def test_several_active_adapters_act_as_in_peft(two: tuple, active: list[str]) -> None:
    theirs, ours = two
    theirs.base_model.set_adapter(active)
    ours.set_adapter(active)
    assert ours.active_adapters == active
    assert_same_logits(ours, theirs)


@torch.no_grad()
def test_a_disabled_adapter_leaves_the_base_as_in_peft(two: tuple) -> None:
    theirs, ours = two
    with theirs.disable_adapter(), ours.disable_adapter():
        assert_same_logits(ours, theirs)


@torch.no_grad()
def test_merged_logits_are_those_of_peft(two: tuple) -> None:
    theirs, ours = two
    theirs.merge_adapter(["default", "second"])
    ours.merge_adapter(["default", "second"])
    assert_same_logits(ours, theirs)


def test_several_adapters_are_saved_where_peft_saves_them(two: tuple, tmp_path: Path) -> None:
    _, ours = two
    ours.save_pretrained(tmp_path / "ours")
    for place in ("", "second"):
        written = load_file(tmp_path / "ours" / place / WEIGHTS)
        assert_same_tensors(written, load_file(tmp_path / place / WEIGHTS))


# --- start values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["embed_tokens"]], ids=["linear", "embedding"])
def test_start_values_spread_as_pefts(init: bool | str, targets: list[str]) -> None:
    """Standard deviation and largest magnitude agree; both are of some 10,000 values, so they are known to 5 %."""
    base = models.llama(hidden_size=96, intermediate_size=160)
    biased = init != "gaussian" and targets[0] == "q_proj"
    config = peft.LoraConfig(r=32, target_modules=targets, init_lora_weights=init, lora_bias=biased)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    ours = lorafx.compile(base, copy.deepcopy(config), random_state=0)
    expected = {file_key(n): p.detach() for n, p in theirs.named_parameters() if "lora_" in n}
    actual = {file_key(n): p.detach() for n, p in ours.named_parameters() if "lora_" in n}
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        spread = 0.5 if tensor.ndim == 1 else 0.05  # a bias has a hundred values
        assert float(actual[key].std()) == pytest.approx(float(tensor.std()), rel=spread), key
        assert float(actual[key].mean()) == pytest.approx(0, abs=0.1 * float(tensor.std()) + 1e-9 + spread * 0.2)


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_a_new_adapter_changes_nothing_as_in_peft(init: bool | str) -> None:
    base = models.llama(**ONE_LAYER["llama"]).eval()
    lora = lorafx.compile(base, lorafx.LoraConfig(target_modules="all-linear", init_lora_weights=init)).eval()
    with torch.no_grad():
        inputs = models.call("llama")
        assert torch.equal(lora(**inputs).logits, base(**inputs).logits)
