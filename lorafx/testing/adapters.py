"""Random configs and adapters for a random model."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from .. import api
from ..adapters.kinds.lora import rank as rank_of
from ..adapters.kinds.lora_config import LoraConfig
from ..adapters.readings import CONV1D, EMBEDDING, LINEAR, Reading
from ..adapters.site import Site
from ..adapters.storages import weights_of
from ..model.adaptation import of
from ..model.adapted_model import AdaptedModel
from ..tree.lookup import find_tensor, tensor_at
from .checks import Call
from .models import RandomModel, models


@st.composite
def configs(
    draw: st.DrawFn,
    model: nn.Module,
    *,
    mergeable: bool = False,
    replaces: bool = True,
    max_rank: int = 4,
) -> LoraConfig:
    """Random LoRA configs that fit a model, for adapters that do not start at zero; ranks up to `max_rank`.

    Targets are a list, a regex or "all-linear"; ranks and alphas vary by pattern. `mergeable` leaves out what cannot
    be merged: convolutions in groups, and `lora_bias` where a layer has no bias to merge it into. `replaces` allows
    `bias` and `modules_to_save`: two adapters that replace the same tensor cannot be active together. If the least
    common multiple of the layers' groups is larger than `max_rank`, ranks are that.
    """
    targets, chosen = draw(_targets(model, mergeable))
    saved = draw(_saved(model, chosen)) if replaces else None
    sites = [name for name in chosen if not _inside(name, saved)]
    layers = [model.get_submodule(name) for name in sites]
    step = math.lcm(*(getattr(layer, "groups", 1) for layer in layers))
    ranks = st.integers(1, max(1, max_rank // step)).map(lambda k: k * step)
    alphas = st.integers(1, 16) | st.floats(0.5, 8, width=16)
    return LoraConfig(
        target_modules=targets,
        modules_to_save=saved,
        r=draw(ranks),
        lora_alpha=draw(alphas),
        lora_dropout=draw(st.sampled_from([0.0, 0.1, 0.5])),
        use_rslora=draw(st.booleans()),
        rank_pattern=draw(st.dictionaries(_site_patterns(sites), ranks, max_size=2)),
        alpha_pattern=draw(st.dictionaries(_site_patterns(sites), alphas, max_size=2)),
        bias=draw(st.sampled_from(["none", "all", "lora_only"])) if replaces else "none",
        lora_bias=_takes_lora_bias(layers, mergeable) and draw(st.booleans()),
        init_lora_weights=False,
    )


def adaptable(model: nn.Module, mergeable: bool = False) -> list[str]:
    """Names of the modules that can be adapted; if `mergeable`, only those whose adapters can be merged."""
    named = model.named_modules(remove_duplicate=False)
    fit = {name: module for name, module in named if name and _readings(module)}
    return [name for name, module in fit.items() if not mergeable or getattr(module, "groups", 1) == 1]


def _readings(module: nn.Module) -> list[Reading]:
    return [reading for _, reading, _ in weights_of(module)]


@st.composite
def _targets(draw: st.DrawFn, model: nn.Module, mergeable: bool) -> tuple[Any, list[str]]:
    """`target_modules`, and the names of the modules that it matches."""
    names = adaptable(model, mergeable)
    ends = {name: picked for name in names if set(picked := _ending_in(model, name)) <= set(names)}
    linear = [name for name in names if {LINEAR, CONV1D}.intersection(_readings(model.get_submodule(name)))]
    style = draw(st.sampled_from(["regex"] + ["list"] * bool(ends) + ["all-linear"] * bool(linear)))
    if style == "all-linear":
        return style, linear
    some = draw(st.lists(st.sampled_from(sorted(ends) if style == "list" else names), min_size=1, unique=True))
    if style == "regex":
        return "|".join(map(re.escape, some)), some
    return some, sorted({picked for name in some for picked in ends[name]})


def _ending_in(model: nn.Module, end: str) -> list[str]:
    """Names of the modules that the entry `end` of a list of targets picks."""
    names = (name for name, _ in model.named_modules(remove_duplicate=False))
    return [name for name in names if name == end or name.endswith(f".{end}")]


@st.composite
def _saved(draw: st.DrawFn, model: nn.Module, chosen: list[str]) -> list[str] | None:
    """`modules_to_save`: usually None, else one module that does not contain every target."""
    owners = [name for name, module in model.named_modules() if name and next(module.parameters(), None) is not None]
    possible = [name for name in owners if _can_be_saved(model, name, chosen)]
    wanted = draw(st.sampled_from([False, False, True])) and possible
    return [draw(st.sampled_from(possible))] if wanted else None


def _can_be_saved(model: nn.Module, saved: str, chosen: list[str]) -> bool:
    """Whether some target is outside the saved module, and none of those shares a tensor with it."""
    left = [name for name in chosen if not _inside(name, [saved])]
    own = {id(parameter) for name in _ending_in(model, saved) for parameter in model.get_submodule(name).parameters()}
    return bool(left) and not any(id(p) in own for name in left for p in model.get_submodule(name).parameters())


def _inside(name: str, saved: Sequence[str] | None) -> bool:
    return any(re.match(rf"(^|.*\.){re.escape(module)}($|\..*)", name) for module in saved or ())


def _site_patterns(sites: Sequence[str]) -> st.SearchStrategy[str]:
    return st.sampled_from([*map(re.escape, sites), *(name.rpartition(".")[2] for name in sites), r".*\.fc"])


def _takes_lora_bias(layers: Sequence[nn.Module], mergeable: bool) -> bool:
    readings = [reading for layer in layers for reading in _readings(layer)]
    return EMBEDDING not in readings and all(layer.bias is not None for layer in layers if mergeable)


@dataclass(frozen=True)
class Adapted:
    """A random model, configs of adapters for it, and `scale`, the size of ΔW relative to W."""

    model: RandomModel
    configs: tuple[LoraConfig, ...]
    scale: float
    autocast_adapter_dtype: bool = True
    names: tuple[str, ...] = field(default=("default", "second", "third", "fourth"), repr=False)

    def build(self, *, start: bool = False, **options: Any) -> AdaptedModel:
        """A new base model with all the adapters active, in eval mode. `options` go to `compile`.

        The adapters' values are random, or with `start` their start values, in which B is zero.
        """
        options = {"autocast_adapter_dtype": self.autocast_adapter_dtype, **options}
        first, *others = [config.replace(init_lora_weights=start) for config in self.configs]
        lora = api.compile(self.model.build(), first, random_state=self.model.seed, **options)
        for name, config in zip(self.names[1:], others):
            lora.add_adapter(name, config, random_state=self.model.seed)
        of(lora).set_adapter(list(self.names[: len(self.configs)]))
        if not start:
            randomize(lora, self.scale, seed=self.model.seed)
        return lora.eval()

    def call(self, seed: int = 0) -> Call:
        """A function that calls a model on the random model's inputs for this seed, as checks take it."""
        inputs = self.model.inputs(seed)
        return lambda model: model(**inputs)


@st.composite
def adapted(
    draw: st.DrawFn,
    models: st.SearchStrategy[RandomModel] = models(),  # noqa: B008  (a strategy is a value)
    *,
    adapters: int = 1,
    mergeable: bool = True,
    replaces: bool = True,
    scales: st.SearchStrategy[float] = st.sampled_from([1e-3, 0.05, 1.0]),  # noqa: B008
) -> Adapted:
    """Random models with one to `adapters` adapters, whose ΔW has one of the `scales` relative to W.

    `mergeable` and `replaces` are those of `configs`; only the first adapter may replace biases and modules.
    """
    model = draw(models.filter(lambda m: not mergeable or adaptable(m.model, mergeable)))
    count = draw(st.integers(1, adapters))
    chosen = [draw(configs(model.model, mergeable=mergeable, replaces=replaces and not i)) for i in range(count)]
    return Adapted(model, tuple(chosen), draw(scales), draw(st.booleans()))


@torch.no_grad()
def randomize(lora: AdaptedModel, scale: float = 0.1, *, seed: int = 0) -> None:
    """Give every adapter random values, so that at every site rms(ΔW) is about `scale` times rms(W).

    With A ~ N(0, 1/r) and B ~ N(0, (scale · rms(W) / s)²) an element of s · B A has variance
    s² · r · (1/r) · (scale · rms(W) / s)², which is (scale · rms(W))². A bias that an adapter adds is about `scale`
    times the base's bias, or else W; own copies of base tensors move by `scale` times their rms.
    """
    rng = torch.Generator().manual_seed(seed)
    for adapter in lora._lorafx.adapters.values():
        for site in adapter.selection:
            _randomize_site(adapter, lora, site, scale, rng)
        for base, own in adapter.replaced.items():
            start, tensor = tensor_at(lora, base), tensor_at(lora, own)
            if tensor.is_floating_point():
                tensor.copy_(start.double() + _normal(tensor, scale * _rms(start), rng))


def _randomize_site(adapter: Any, lora: AdaptedModel, site: Site, scale: float, rng: torch.Generator) -> None:
    weight, bias = tensor_at(lora, site.weight), find_tensor(lora, site.bias)
    scaling = adapter.kind.numbers(site, adapter.config)["scaling"]
    rank = rank_of(site, adapter.config)
    for suffix, tensor in adapter.tensors_at(lora, site).items():
        if suffix.endswith("bias"):
            deviation = scale * _rms(weight if bias is None else bias) / scaling
        else:
            deviation = 1 / math.sqrt(rank) if "_A" in suffix else scale * _rms(weight) / scaling
        tensor.copy_(_normal(tensor, deviation, rng))


def _normal(like: Tensor, deviation: float, rng: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=rng, dtype=torch.float64).mul_(deviation).to(like.device)


def _rms(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().mean().sqrt())
