"""Kinds beside PEFT's: a row is a config that both libraries take, and the layers that it acts on.

Models are in float64, and an adapter's values random, as PEFT saved them: what the two compute differs by rounding.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import models
import peft
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorafx

PREFIX = "base_model.model."
CLOSE = {"rtol": 1e-10, "atol": 1e-10}  # of sums of at most a few hundred products in float64
# Where PEFT computes something in float32, whatever the model's dtype: a Fourier transform, singular values.
IN_FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}


class Pair(nn.Module):
    """(…, n) -> (…, n): one layer up, a tanh, and one down."""

    def __init__(self, up: nn.Module, down: nn.Module):
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Repeated(nn.Module):
    """Equal pairs one after another, each added to what it was given; `embed` makes rows of numbers first."""

    def __init__(self, make: Callable[[], nn.Module], embed: nn.Module | None = None):
        super().__init__()
        self.embed = embed
        self.layers = nn.ModuleList(make() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.embed is None else self.embed(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


# What to build, and an input for it. No layer is square, and every other one has no bias.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: Repeated(lambda: Pair(nn.Linear(8, 12), nn.Linear(12, 8, bias=False))), (3, 5, 8)),
    "addmm": (lambda: Repeated(lambda: Pair(Conv1D(12, 8), Conv1D(8, 12))), (3, 5, 8)),
    "embedding": (
        lambda: Repeated(lambda: Pair(nn.Linear(8, 12), nn.Linear(12, 8)), nn.Embedding(11, 8, padding_idx=2)),
        (3, 5),
    ),
    "conv1d": (
        lambda: Repeated(lambda: Pair(nn.Conv1d(4, 6, 3, padding=1), nn.Conv1d(6, 4, 1, bias=False))),
        (2, 4, 7),
    ),
    "conv2d": (
        lambda: Repeated(lambda: Pair(nn.Conv2d(4, 6, (3, 1), padding=(1, 0)), nn.Conv2d(6, 4, 1, bias=False))),
        (2, 4, 5, 6),
    ),
    "pointwise": (
        lambda: Repeated(lambda: Pair(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1))),
        (2, 4, 5, 6),
    ),
    "square": (
        lambda: Repeated(lambda: Pair(nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 1, bias=False))),
        (2, 4, 5, 6),
    ),
    "conv3d": (
        lambda: Repeated(
            lambda: Pair(nn.Conv3d(4, 6, (1, 3, 1), padding=(0, 1, 0)), nn.Conv3d(6, 4, (3, 1, 1), padding=(1, 0, 0)))
        ),
        (2, 4, 2, 5, 3),
    ),
    "groups": (
        lambda: Repeated(lambda: Pair(nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.Conv2d(6, 4, 1, bias=False))),
        (2, 4, 5, 6),
    ),
}


@dataclass(frozen=True)
class KindCase:
    """A config by the name and fields that both libraries have, and the layers that it acts on.

    `starts_at_zero` says that PEFT's start values change nothing, `merges` that it is a change of the base's tensors.
    `dropout` says that a training step draws random numbers: PEFT's, from the same seed. `close` is how near PEFT's
    numbers are to ours. `wrong_gradient` is a tensor of which PEFT's own backward gives something else than the
    derivative. `on_llama` are fields in which a Llama's names stand.
    """

    layers: str
    config: str
    fields: dict[str, Any] = field(default_factory=dict)
    starts_at_zero: bool = True
    merges: bool = True
    dropout: bool = False
    close: dict[str, float] = field(default_factory=lambda: CLOSE)
    wrong_gradient: str = ""
    on_llama: dict[str, Any] = field(default_factory=dict)

    @property
    def targets(self) -> list[str]:
        return ["embed", "up"] if self.layers == "embedding" else ["up", "down"]

    def base(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return LAYERS[self.layers][0]().double()

    def x(self) -> Tensor:
        rng, shape = torch.Generator().manual_seed(1), LAYERS[self.layers][1]
        if self.layers == "embedding":
            return torch.randint(11, shape, generator=rng)
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    @property
    def inputs(self) -> models.Call:
        return (self.x(),)

    def theirs(self) -> peft.PeftConfig:
        return getattr(peft, self.config)(**{"target_modules": self.targets} | self.fields)

    def ours(self) -> Any:
        return getattr(lorafx, self.config)(**{"target_modules": self.targets} | self.fields)


LORA = {"r": 2, "lora_alpha": 3}
IA3 = {"feedforward_modules": ["down"]}
DORA = LORA | {"use_dora": True}
BLOCKS = {"target_modules_bd_a": ["up"], "target_modules_bd_b": ["down"], "nblocks": 2}
ON_LLAMA = {"use_bdlora": BLOCKS | {"target_modules_bd_a": ["q_", "v_"]}}
BDLORA = {"r": 4, "lora_alpha": 3, "lora_dropout": 0.4, "use_bdlora": BLOCKS}
KASA = LORA | {"lora_dropout": 0.4, "rank_pattern": {"up": 3}, "kasa_config": {"beta": 0.1, "gamma": 0.2}}
MONTECLORA = LORA | {"monteclora_config": {"num_samples": 3, "sample_scaler": 0.2, "buffer_size": 1}}
VELORA = LORA | {"velora_config": {"num_groups": 3, "scale": 0.7}}  # of 8 features a group has 3, the last with a zero
ONCE = {"num_groups": 2, "init_type": "batch_average_once"}
RANDOM = {"num_groups": 4, "init_type": "random"}
CASES = {
    "lora linear": KindCase("linear", "LoraConfig", LORA),
    "lora addmm": KindCase("addmm", "LoraConfig", LORA | {"fan_in_fan_out": True}),
    "lora embedding": KindCase("embedding", "LoraConfig", LORA),
    "lora conv2d": KindCase("conv2d", "LoraConfig", LORA),
    "dora linear": KindCase("linear", "LoraConfig", DORA),
    "dora dropout": KindCase("linear", "LoraConfig", DORA | {"lora_dropout": 0.4}, dropout=True),
    "dora addmm": KindCase("addmm", "LoraConfig", DORA | {"fan_in_fan_out": True}),
    "dora addmm dropout": KindCase("addmm", "LoraConfig", DORA | {"lora_dropout": 0.4, "fan_in_fan_out": True}),
    "dora embedding": KindCase("embedding", "LoraConfig", DORA),
    "dora conv1d": KindCase("conv1d", "LoraConfig", DORA),
    "dora conv2d": KindCase("conv2d", "LoraConfig", DORA | {"lora_dropout": 0.4}, dropout=True),
    "dora conv3d": KindCase("conv3d", "LoraConfig", DORA),
    "dora groups": KindCase("groups", "LoraConfig", DORA | {"r": 4}, merges=False),
    "bdlora linear": KindCase("linear", "LoraConfig", BDLORA, dropout=True, on_llama=ON_LLAMA),
    "kasa patterns": KindCase("linear", "LoraConfig", KASA, starts_at_zero=False, dropout=True, close=IN_FLOAT32),
    "monteclora samples": KindCase("linear", "LoraConfig", MONTECLORA, dropout=True, close=IN_FLOAT32),
    "velora average": KindCase("linear", "LoraConfig", VELORA | {"lora_dropout": 0.4}, dropout=True, close=IN_FLOAT32),
    "velora once": KindCase("linear", "LoraConfig", LORA | {"velora_config": ONCE}, close=IN_FLOAT32),
    "velora random": KindCase("linear", "LoraConfig", LORA | {"velora_config": RANDOM}, close=IN_FLOAT32),
    "loha linear": KindCase("linear", "LoHaConfig", {"r": 2, "alpha": 3}),
    "loha rank 4": KindCase("linear", "LoHaConfig", {"r": 4, "init_weights": False}, starts_at_zero=False),
    "loha conv2d": KindCase("conv2d", "LoHaConfig", {"r": 1}),
    "loha conv1d": KindCase("conv1d", "LoHaConfig", {"r": 2, "use_effective_conv2d": True}, wrong_gradient="_a.d"),
    "loha groups": KindCase("groups", "LoHaConfig", {"r": 2, "use_effective_conv2d": True}, wrong_gradient="_a.d"),
    "loha groups plain": KindCase("groups", "LoHaConfig", {"r": 1}),
    "lokr linear": KindCase("linear", "LoKrConfig", {"r": 1, "alpha": 3}),
    "lokr both": KindCase("linear", "LoKrConfig", {"r": 1, "decompose_both": True, "decompose_factor": 4}),
    "lokr whole": KindCase("linear", "LoKrConfig", {"r": 8, "init_weights": "lycoris"}),
    "lokr conv2d": KindCase("conv2d", "LoKrConfig", {"r": 1, "init_weights": False}, starts_at_zero=False),
    "lokr conv1d": KindCase("conv1d", "LoKrConfig", {"r": 8}),
    "lokr groups": KindCase("groups", "LoKrConfig", {"r": 8}),
    "oft linear": KindCase("linear", "OFTConfig", {"oft_block_size": 4}),
    "oft exact": KindCase(
        "linear", "OFTConfig", {"r": 2, "oft_block_size": 0, "use_cayley_neumann": False, "init_weights": False}, False
    ),
    "oft shared": KindCase("linear", "OFTConfig", {"oft_block_size": 4, "block_share": True}),
    "oft three terms": KindCase("linear", "OFTConfig", {"oft_block_size": 2, "num_cayley_neumann_terms": 3}),
    "oft seven terms": KindCase("linear", "OFTConfig", {"oft_block_size": 2, "num_cayley_neumann_terms": 7}),
    "oft embedding": KindCase("embedding", "OFTConfig", {"oft_block_size": 4}),
    "oft pointwise": KindCase("pointwise", "OFTConfig", {"oft_block_size": 2}),
    "boft linear": KindCase("linear", "BOFTConfig", {"boft_block_size": 2}),
    "boft blocks": KindCase(
        "linear", "BOFTConfig", {"boft_block_size": 0, "boft_block_num": 2, "init_weights": False}, False
    ),
    "boft pointwise": KindCase("pointwise", "BOFTConfig", {"boft_block_size": 2}),
    "boft square": KindCase("square", "BOFTConfig", {"boft_block_size": 2}),
    "hra square": KindCase("square", "HRAConfig", {"r": 2}),
    "hra linear": KindCase("linear", "HRAConfig", {"r": 4}),
    "hra odd": KindCase("linear", "HRAConfig", {"r": 3}, starts_at_zero=False),
    "hra orthogonal": KindCase("linear", "HRAConfig", {"r": 3, "apply_GS": True}, starts_at_zero=False),
    "hra pointwise": KindCase("pointwise", "HRAConfig", {"r": 2}),
    "ia3 linear": KindCase("linear", "IA3Config", IA3, on_llama={"feedforward_modules": ["down_proj"]}),
    "ia3 random": KindCase("linear", "IA3Config", {"feedforward_modules": [], "init_ia3_weights": False}, False),
    "ia3 addmm": KindCase("addmm", "IA3Config", IA3 | {"fan_in_fan_out": True}),
    "ia3 conv2d": KindCase("conv2d", "IA3Config", IA3),
    "ia3 conv3d": KindCase("conv3d", "IA3Config", {"feedforward_modules": r".*\.1\.(up|down)"}),
    "ia3 groups": KindCase("groups", "IA3Config", {"feedforward_modules": ["up"]}),
}


@dataclass(frozen=True)
class Both:
    """A case: the folder that PEFT wrote, and the two models that read it, each on a copy of the same base."""

    case: KindCase
    base: nn.Module
    folder: Path
    theirs: peft.PeftModel
    ours: lorafx.AdaptedModel


def both(case: KindCase, folder: Path, base: nn.Module | None = None, **options: Any) -> Both:
    """PEFT makes an adapter of random values and saves it to `folder`; both load it to train, we by `options`."""
    base = case.base() if base is None else base
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(copy.deepcopy(base), case.theirs())
        shake(made)
        made.save_pretrained(folder)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True)
    ours = lorafx.load(copy.deepcopy(base), folder, is_trainable=True, **options)
    return Both(case, base, folder, theirs, ours)


def drawn(sampler: Any) -> dict[str, Tensor]:
    """What a sampler of PEFT's MonteCLoRA is to give in a call: of a Wishart matrix its diagonal counts."""
    own = sampler.model
    normal = functools.partial(torch.randn, dtype=own.dtype)
    diagonal = normal(own.out_features, own.out_features).square().sum(-1)
    samples = normal(own.num_samples, own.in_features, own.out_features)
    return {"z_wishart": diagonal.diag(), "z_mvn": samples, "z_dirichlet": normal(own.num_samples)}


def shake(model: nn.Module) -> None:
    """Move all that trains away from where it starts."""
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=0.2)


def step(model: nn.Module, inputs: models.Call) -> tuple[Tensor, dict[str, Tensor]]:
    """A training step of either model: the output, and the gradients by names that both share."""
    model.train()
    model.zero_grad()
    torch.manual_seed(3)
    out = models.logits(models.run(model, inputs))
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return out.detach(), {name: p.grad for name, p in trained(model).items()}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a model of either library trains, by names that both share.

    PEFT trains a number that it divides by, `ranknum`, and does not save it.
    """
    named = {_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    return {name: parameter for name, parameter in named.items() if ".ranknum." not in name}


def _name(name: str) -> str:
    """A parameter's name; PEFT has modules for magnitudes, which its files do not show."""
    return name.removeprefix(PREFIX).replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector.default")
