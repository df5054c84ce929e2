"""EVA: A starts as the directions that vary most in what its layer is given (Paischer et al., arXiv 2410.07170).

Of each layer's inputs the principal components are found, batch by batch, until they turn no more. Layers that explain
more of their inputs' variance get more of the ranks.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from tqdm import tqdm

from ..adapters.adapter import plan
from ..adapters.kinds.lora import pattern_value, rank
from ..adapters.readings import CONV1D, LINEAR
from ..adapters.site import Site
from ..errors import AdapterError, ConfigError, warn
from ..tree.mirror import mirrored
from .adaptation import of
from .adapted_model import AdaptedModel
from .preprocessing import given, in_mode

_MOST = 1000  # batches


def chosen_tokens(inputs: Mapping[str, Tensor], config: Any) -> Tensor:
    """Which tokens count, (batch, length): those of `attention_mask`, but for those whose label is masked."""
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    if config.start["use_label_mask"] and "labels" in inputs:
        mask = mask & (inputs["labels"] != config.start["label_mask_value"])
    return mask


def rows_of_tokens(layer_input: Tensor, mask: Tensor | None, layer_name: str) -> Tensor:
    """(batch, length, in), or any (…, in) without a mask -> (n, in): the rows that count."""
    return layer_input.flatten(0, -2) if mask is None else layer_input[mask]


def by_keywords(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Call a model with a batch."""
    return model(**inputs)


@torch.no_grad()
def initialize_lora_eva_weights(
    model: AdaptedModel,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = by_keywords,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = chosen_tokens,
    prepare_layer_inputs_fn: Callable[[Any, Any, str], Tensor] = rows_of_tokens,
    adapter_name: str = "default",
    show_progress_bar: bool = True,
) -> None:
    """Give an adapter of `init_lora_weights="eva"` its start values, and its ranks, as PEFT's function does.

    Call it before training, and before making an optimizer: the adapter gets new parameters. Ranks move between
    layers, up to `rho` times that of the config, and a layer of rank 0 is not adapted any more; `rank_pattern`,
    `alpha_pattern` and `target_modules` of its config say so. Layers that are not linear keep the values they had, with
    a warning.

    Args:
        dataloader: batches of the model's inputs, gone through again and again until the components are found. Each
            needs at least `rho` times r tokens that count.
        eva_state_dict: A (rank, in) by the name of a module, of `get_eva_state_dict`; instead of a dataloader.
        forward_fn: called with the base model and a batch.
        prepare_model_inputs_fn: from a batch and the config, what `prepare_layer_inputs_fn` is given; None for None.
        prepare_layer_inputs_fn: from what a layer is given, that, and the layer's name, rows (n, in) to look at.

    Raises `AdapterError` for an unknown or merged adapter, one that acts with others, and batches that are too small;
    `ConfigError` for one of other start values. The model is as it was in each case.
    """
    adapted = of(model)
    adapter = adapted._require_unmerged(adapter_name, "giving it start values")
    if adapter.config.init_lora_weights != "eva":  # type: ignore[attr-defined]
        raise ConfigError(f'{adapter_name!r} is not of `init_lora_weights="eva"`')
    if len(adapted.active_adapters) > 1:
        raise AdapterError("other adapters act, too: activate this one alone first")
    if eva_state_dict is None:
        if dataloader is None:
            raise ConfigError("give a `dataloader`, or an `eva_state_dict`")
        how = forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn
        eva_state_dict = get_eva_state_dict(model, dataloader, *how, adapter_name, show_progress_bar)
    _give(model, adapter_name, eva_state_dict)


@torch.no_grad()
def get_eva_state_dict(
    model: AdaptedModel,
    dataloader: Iterable[Any],
    forward_fn: Callable[[nn.Module, Any], Any] = by_keywords,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = chosen_tokens,
    prepare_layer_inputs_fn: Callable[[Any, Any, str], Tensor] = rows_of_tokens,
    adapter_name: str = "default",
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """A (rank, in) by the name of each linear module that the adapter is at. See `initialize_lora_eva_weights`."""
    adapted = of(model)
    adapter, base = adapted._adapter(adapter_name), adapted._lorafx.base
    config: Any = adapter.config
    sites = [site for site in adapter.selection if site.reading in (LINEAR, CONV1D)]
    ranks = {site.module: rank(site, config) for site in sites}
    most = max((round(config.start["rho"] * r) for r in ranks.values()), default=0)
    looks = _Looks(base, dict.fromkeys(ranks, most), prepare_layer_inputs_fn)
    with in_mode(base, training=False), looks:
        for seen, inputs in enumerate(tqdm(_again_and_again(dataloader), "eva", disable=not show_progress_bar), 1):
            inputs = _placed(inputs, base)
            looks.given = None if prepare_model_inputs_fn is None else prepare_model_inputs_fn(inputs, config)
            forward_fn(base, inputs)
            if (found := looks.components(ranks, config.start)) is not None:
                return found
            if seen == _MOST:
                raise AdapterError(
                    f"after {seen} batches the components still turn: lower `tau`, or give batches of more tokens than "
                    f"{most} that count"
                )
    raise ConfigError("the dataloader is empty, or ended and cannot be gone through again")


def _again_and_again(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches from the first to the last, and from the first again; none if there is none any more."""
    is_empty = False
    while not is_empty:
        is_empty = True
        for batch in batches:
            is_empty = False
            yield batch


def _placed(inputs: Any, base: nn.Module) -> Any:
    """The inputs where the base's first parameter is."""
    device = next((parameter.device for parameter in base.parameters() if not parameter.is_meta), torch.device("cpu"))
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), inputs)


@dataclass
class _Components:
    """The principal components of rows that come in batches (Ross et al., 2008): directions (k, in), values (k,)."""

    most: int
    count: int = 0
    spread: Any = 0.0  # the sum of squared distances of all rows to their mean
    mean: Any = 0.0
    values: Tensor = field(default_factory=lambda: torch.empty(0))
    directions: Tensor = field(default_factory=lambda: torch.empty(0))
    steady: Tensor = field(
        default_factory=lambda: torch.empty(0)
    )  # by how much each direction has not turned, a cosine

    def update(self, rows: Tensor) -> None:
        """Take rows (n, in) in, of which there have to be as many as components."""
        if len(rows) < self.most:
            return
        n, mean, before = len(rows), rows.mean(0), self.directions
        centred = rows - mean
        apart = math.sqrt(self.count * n / (self.count + n)) * (self.mean - mean)
        known = [self.values[:, None] * before, apart[None]] if self.count else []
        stack = torch.cat([centred, *known])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            _, values, directions = torch.svd_lowrank(stack, min(2 * self.most, *stack.shape), niter=4)
        self.values, self.directions = values[: self.most], directions.t()[: self.most]
        self.steady = F.cosine_similarity(self.directions, before).abs() if self.count else torch.zeros(self.most)
        self.spread = self.spread + centred.square().sum() + apart.square().sum()
        self.mean = (self.count * self.mean + n * mean) / (self.count + n)
        self.count += n

    @property
    def explained(self) -> Tensor:
        """Which share of the rows' variance each component explains, (k,)."""
        return self.values.square() / self.spread.clamp(min=torch.finfo(self.values.dtype).tiny)


class _Looks(contextlib.ExitStack):
    """Within the `with` block, what modules are given is looked at. Those that are given one tensor share the look."""

    def __init__(self, base: nn.Module, most: Mapping[str, int], rows: Callable[[Any, Any, str], Tensor]):
        super().__init__()
        self.base, self.rows, self.given = base, rows, None
        self.leaders: dict[str, str] = {}
        self.found = {name: _Components(most[name]) for name in most}
        self._last: tuple[Any, str] = None, ""

    def __enter__(self) -> _Looks:
        for name in self.found:
            look = functools.partial(self._look, name)
            hook = self.base.get_submodule(name).register_forward_pre_hook(look, with_kwargs=True)
            self.callback(hook.remove)
        return self

    def _look(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, (last, leader) = given(args, kwargs), self._last
        leader = self.leaders.setdefault(name, leader if x is last and leader in self.leaders else name)
        self._last = x, leader
        if leader == name:
            self.found[name].update(self.rows(x.detach(), self.given, name).float())

    def components(self, ranks: Mapping[str, int], start: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """A (rank, in) by name, with as many rows in all as `ranks`; None while components that are needed turn."""
        found = {name: self.found[self.leaders[name]] for name in self.leaders}
        if len(found) < len(self.found) or not all(each.count for each in found.values()):
            return None
        given = Counter(_best(found, ranks, start["rho"]))
        if any((found[name].steady[: given[name]] < start["tau"]).any() for name in found):
            return None
        return {name: _rows(each, given[name], start["whiten"]) for name, each in found.items()}


def _best(found: Mapping[str, _Components], ranks: Mapping[str, int], rho: float) -> list[str]:
    """Names of layers, one for each component that explains most of its layer's inputs, as many as there are ranks."""
    pairs = [(float(share), name) for name in found for share in found[name].explained[: round(rho * ranks[name])]]
    return [name for _, name in sorted(pairs, key=lambda pair: -pair[0])[: sum(ranks.values())]]


def _rows(found: _Components, r: int, whiten: bool) -> Tensor:
    rows = found.directions[:r]
    return rows / found.values[:r, None].sqrt() if whiten else rows.clone()


def _give(model: AdaptedModel, name: str, found: Mapping[str, Tensor]) -> None:
    """Have an adapter be one of the ranks and values that were found."""
    adapted = of(model)
    adapter, active = adapted._adapter(name), adapted.active_adapters
    config: Any = adapter.config
    sites = {site.module: site for site in adapter.selection}
    if unknown := sorted(found.keys() - sites.keys()):
        raise AdapterError(f"{name!r} is not at {', '.join(unknown)}")
    if rest := sorted(sites.keys() - found.keys()):
        warn(f"EVA is for linear layers; these keep the start values they had: {', '.join(rest)}")
    ranks = {module: len(found[module]) if module in found else rank(site, config) for module, site in sites.items()}
    changed = _redistributed(config, sites, ranks)
    plan(mirrored(adapted.tree), name, changed)  # which refuses what cannot be, before anything is changed
    kept = {
        site.module: {suffix: tensor.clone() for suffix, tensor in adapter.tensors_at(adapted.tree, site).items()}
        for site in adapter.selection
    }
    adapted.delete_adapter(name)
    adapted.add_adapter(name, changed)
    adapted.set_adapter(active)
    new = adapted._adapter(name)
    for site in new.selection:
        tensors = new.tensors_at(adapted.tree, site)
        for suffix, tensor in tensors.items():
            if site.module not in found:
                tensor.copy_(kept[site.module][suffix])
            elif suffix == "lora_A.weight":
                tensor.copy_(found[site.module])


def _redistributed(config: Any, sites: Mapping[str, Site], ranks: Mapping[str, int]) -> Any:
    """The config for these ranks by module: without those of rank 0, and with α that keeps the scale of each."""
    alphas = {name: pattern_value(config.alpha_pattern, site.named, config.lora_alpha) for name, site in sites.items()}
    if config.start["adjust_scaling_factors"]:
        alphas = {name: alphas[name] * ranks[name] / rank(site, config) for name, site in sites.items()}
    left = [name for name, r in ranks.items() if r]
    return config.replace(
        target_modules=tuple(left),
        rank_pattern={name: ranks[name] for name in left if ranks[name] != config.r},
        alpha_pattern={name: alphas[name] for name in left if alphas[name] != config.lora_alpha},
    )
