"""EVA: A starts as the directions that vary most in what its layer is given (Paischer et al., arXiv 2410.07170).

Of each layer's inputs the principal components are found, batch by batch, until they turn no more. Layers that explain
more of their inputs' variance get more of the ranks.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from tqdm import tqdm

from ..adapters.adapter import Adapter, plan
from ..adapters.kinds.lora import pattern_value, rank
from ..adapters.readings import CONV1D, LINEAR
from ..adapters.site import Site
from ..errors import AdapterError, ConfigError, warn
from ..tree.attached import named_own_modules
from ..tree.mirror import mirrored
from .adaptation import of
from .adapted_model import AdaptedModel
from .preprocessing import given, in_mode, rows_of

_MOST = 1000  # batches
_ROUNDING = 1e-5  # of its mean, by which rows may differ that would be one, without rounding


def chosen_tokens(inputs: Mapping[str, Tensor], config: Any) -> Tensor:
    """Which tokens count, (batch, length): those of `attention_mask`, but for those whose label is masked.

    Labels of whole sequences, as a classifier has them, say nothing of tokens.
    """
    if not isinstance(inputs, Mapping) or not inputs.keys() & {"attention_mask", "input_ids"}:
        raise ConfigError(
            "which tokens count is not told by a batch without `attention_mask` and `input_ids`: give "
            "`prepare_model_inputs_fn=None` if all do, or a function that says which"
        )
    mask, labels = inputs.get("attention_mask"), inputs.get("labels")
    mask = torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
    if config.start["use_label_mask"] and labels is not None and labels.shape == mask.shape:
        mask = mask & (labels != config.start["label_mask_value"])
    return mask


def rows_of_tokens(layer_input: Tensor, mask: Tensor | None, layer_name: str) -> Tensor:
    """(batch, length, in), or any (…, in) without a mask -> (n, in): the rows that count."""
    if mask is None:
        return rows_of(layer_input)
    if mask.shape != layer_input.shape[:-1]:
        raise AdapterError(
            f"{layer_name} is given a tensor {tuple(layer_input.shape)}, and which tokens count is told by one "
            f"{tuple(mask.shape)}: give a `prepare_layer_inputs_fn` that chooses its rows"
        )
    return layer_input[mask]


def by_keywords(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Call a model with a batch."""
    if not isinstance(inputs, Mapping):
        raise ConfigError(f"a batch is a {type(inputs).__name__}, and no dict: give a `forward_fn(model, batch)`")
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

    Raises `AdapterError` for an unknown adapter, one that acts with others, while any is merged, for batches that are
    too small or not finite, and for values that do not fit; `ConfigError` for one of other start values, and batches
    that the functions above do not know. The model is as it was in each case.
    """
    adapted = of(model)
    _require_eva(model, adapter_name)
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
    adapter, base = _require_eva(model, adapter_name), of(model)._lorafx.base
    config: Any = adapter.config
    ranks = {name: rank(site, config) for name, site in _linear(adapter).items()}
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
                raise AdapterError(f"after {seen} batches {looks.lacking()}")
    raise ConfigError("the dataloader is empty, or ended and cannot be gone through again")


def _require_eva(model: AdaptedModel, name: str) -> Adapter:
    """The adapter of this name, if it can be given start values now."""
    adapted = of(model)
    adapter = adapted._adapter(name)
    if getattr(adapter.config, "init_lora_weights", None) != "eva":
        raise ConfigError(f'{name!r} is not of `init_lora_weights="eva"`')
    if merged := adapted._lorafx.ledger.names:
        raise AdapterError(f"{', '.join(map(repr, merged))} merged into the base: call `unmerge_adapter()` first")
    return adapter


def _linear(adapter: Adapter) -> dict[str, Site]:
    """The sites that get their start values from data, by the names of their modules."""
    sites = (site for site in adapter.selection if site.reading in (LINEAR, CONV1D))
    return {site.module: site for site in sites if site.named == site.module}


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
    if hasattr(inputs, "to"):
        return inputs.to(device)
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
    steady: Tensor = field(default_factory=lambda: torch.empty(0))  # how little each direction has turned, a cosine

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
        """Which share of the rows' variance each component explains, (k,); none where rows differ by rounding alone."""
        rounding = self.count * (_ROUNDING * self.mean).square().sum()
        return self.values.square() / self.spread if self.spread > rounding else torch.zeros_like(self.values)


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
        shares = x is last and self.rows is rows_of_tokens  # any other function may choose by the layer's name
        leader = self.leaders.setdefault(name, leader if shares else name)
        self._last = x, leader
        if leader == name:
            rows = self.rows(x.detach(), self.given, name).float()
            if not rows.isfinite().all():
                raise AdapterError(f"{name}: the data gives numbers that are not finite there")
            self.found[name].update(rows)

    def components(self, ranks: Mapping[str, int], start: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """A (rank, in) by name, with as many rows in all as `ranks`; None while components that are needed turn."""
        found = {name: self.found[self.leaders[name]] for name in self.leaders}
        if len(found) < len(self.found) or not all(each.count for each in found.values()):
            return None
        given = Counter(_best(found, ranks, start["rho"]))
        if not given or any((found[name].steady[: given[name]] < start["tau"]).any() for name in found):
            return None
        return {name: _rows(each, given[name], start["whiten"]) for name, each in found.items()}

    def lacking(self) -> str:
        """Why there are no components yet."""
        few = [name for name in self.found if not self.found[self.leaders.get(name, name)].count]
        if few:
            return (
                f"there was none that gave {', '.join(few[:5])} at least {self.found[few[0]].most} rows that count: "
                "give larger ones that reach all layers, or exclude these"
            )
        return "the components still turn, or what layers are given never varies: lower `tau`, or give larger batches"


def _best(found: Mapping[str, _Components], ranks: Mapping[str, int], rho: float) -> list[str]:
    """Names of layers, one for each component that explains most of its layer's inputs, as many as there are ranks."""
    pairs = [(float(share), name) for name in found for share in found[name].explained[: round(rho * ranks[name])]]
    best = sorted((pair for pair in pairs if pair[0] > 0), key=lambda pair: -pair[0])
    return [name for _, name in best[: sum(ranks.values())]]


def _rows(found: _Components, r: int, whiten: bool) -> Tensor:
    rows = found.directions[:r]
    return rows / found.values[:r, None].sqrt() if whiten else rows.clone()


def _give(model: AdaptedModel, name: str, found: Mapping[str, Tensor]) -> None:
    """Have an adapter be one of the ranks and values that were found."""
    adapted = of(model)
    adapter, active = adapted._adapter(name), adapted.active_adapters
    config: Any = adapter.config
    sites = _linear(adapter)
    _require_fit(name, sites, found)
    given = {sites[module]: rows for module, rows in found.items()}
    if rest := sorted(site.name for site in adapter.selection if site not in given):
        warn(f"EVA is for linear layers; these keep the start values they had: {', '.join(rest)}")
    ranks = {site: len(given[site]) if site in given else rank(site, config) for site in adapter.selection}
    changed = _redistributed(config, ranks, [path for path, _ in named_own_modules(adapted.tree)])
    plan(mirrored(adapted.tree), name, changed)  # which refuses what cannot be, before anything is changed
    kept = {
        site: {suffix: tensor.clone() for suffix, tensor in adapter.tensors_at(adapted.tree, site).items()}
        for site in adapter.selection
    }
    is_wide = any(tensor.dtype == torch.float32 for tensors in kept.values() for tensor in tensors.values())
    adapted.delete_adapter(name)
    adapted.add_adapter(name, changed, autocast_adapter_dtype=is_wide)
    adapted.set_adapter(active)
    new = adapted._adapter(name)
    for site in new.selection:
        values = {"lora_A.weight": given[site]} if site in given else kept[site]
        for suffix, tensor in new.tensors_at(adapted.tree, site).items():
            if suffix in values and not values[suffix].is_meta:  # as those of an adapter without values are
                tensor.copy_(values[suffix])


def _require_fit(name: str, sites: Mapping[str, Site], found: Mapping[str, Tensor]) -> None:
    """Raise `AdapterError` for values that are none of an adapter's A."""
    if unknown := sorted(found.keys() - sites.keys()):
        raise AdapterError(f"{name!r} is not at {', '.join(unknown)}")
    for module, rows in found.items():
        if rows.ndim != 2 or rows.shape[1] != sites[module].in_features or not rows.isfinite().all():
            raise AdapterError(
                f"{module}: start values are finite numbers (rank, {sites[module].in_features}), and not "
                f"{tuple(rows.shape)}{'' if rows.isfinite().all() else ' with others among them'}"
            )


def _redistributed(config: Any, ranks: Mapping[Site, int], modules: Iterable[str]) -> Any:
    """The config for these ranks: without those of rank 0, and with α that keeps the scale of each.

    `modules` are the names of all that the model has.
    """
    alphas = {site: pattern_value(config.alpha_pattern, site.named, config.lora_alpha) for site in ranks}
    if config.start["adjust_scaling_factors"]:
        alphas = {site: alphas[site] * r / rank(site, config) for site, r in ranks.items()}
    left = [site for site, r in ranks.items() if r]
    names = list(dict.fromkeys(site.named for site in left if not site.is_parameter))
    endings = Counter(ending for module in modules for ending in _endings(module))
    changes: dict[str, Any] = {"target_modules": tuple(names)}
    if any(endings[name] > 1 for name in names):  # a list of names would mean those that end so, too
        pattern = "|".join(map(re.escape, names))
        changes = {"target_modules": pattern, "layers_to_transform": None, "layers_pattern": None}

    def key(name: str) -> str:
        return f"^{re.escape(name)}" if endings[name] > 1 else name

    return config.replace(
        rank_pattern={key(site.named): ranks[site] for site in left if ranks[site] != config.r},
        alpha_pattern={key(site.named): alphas[site] for site in left if alphas[site] != config.lora_alpha},
        **changes,
    )


def _endings(name: str) -> Iterator[str]:
    """The name, and what is left of it after each dot."""
    while name:
        yield name
        name = name.partition(".")[2]
