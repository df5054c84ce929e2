"""EVA: A starts as the directions that vary most in what its layer is given (Paischer et al., arXiv 2410.07170).

Of each layer's inputs the principal components are found, batch by batch, until they turn no more. Layers that explain
more of their inputs' variance get more of the ranks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from ..adapters.adapter import Adapter
from ..adapters.expert_names import with_experts
from ..adapters.kinds import config_of
from ..adapters.kinds.lora import pattern_value, rank
from ..adapters.planning import plan
from ..adapters.readings import CONV1D, LINEAR
from ..adapters.selection import select
from ..adapters.site import Site
from ..errors import AdapterError, ConfigError, warn
from ..files.written_config import targets_by_name
from ..tree.lookup import endings
from ..tree.mirror import mirrored
from ..tree.modes import in_mode
from .adaptation import of
from .adapted_model import AdaptedModel
from .components import Chosen, Looks, rows_of_tokens

_MOST = 1000  # batches


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
    prepare_layer_inputs_fn: Chosen | Mapping[str, Chosen] | None = rows_of_tokens,
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
        prepare_layer_inputs_fn: from what a layer is given, that, and the layer's name, rows (n, in) to look at; or one
            for each layer, by name. None, and layers that are not among these, for all rows.

    Raises `AdapterError` for an unknown adapter, one that acts with others, while any is merged, for batches that are
    too small or not finite, and for values that do not fit; `ConfigError` for one of other start values, and batches
    that the functions above do not know. With several processes it needs an `eva_state_dict`, the same in all. The
    model is as it was in each case.
    """
    adapted = of(model)
    _require_eva(model, adapter_name)
    if len(adapted.active_adapters) > 1:
        raise AdapterError("other adapters act, too: activate this one alone first")
    if eva_state_dict is None:
        if dataloader is None:
            raise ConfigError("give a `dataloader`, or an `eva_state_dict`")
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ConfigError(
                "each process would find values and ranks of its own: call `get_eva_state_dict` in one of them, and "
                "give what it has found to `eva_state_dict` in all"
            )
        how = forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn
        eva_state_dict = get_eva_state_dict(model, dataloader, None, *how, adapter_name, show_progress_bar)
    _give(model, adapter_name, eva_state_dict)


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: Any = None,
    forward_fn: Callable[[nn.Module, Any], Any] = by_keywords,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = chosen_tokens,
    prepare_layer_inputs_fn: Chosen | Mapping[str, Chosen] | None = rows_of_tokens,
    adapter_name: str = "default",
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """A (rank, in) by the name of each linear module that the adapter is at. See `initialize_lora_eva_weights`.

    Before there is an adapter, `model` is the base, and `peft_config` the config that it is to have.
    """
    base, config, sites = _asked(model, peft_config, adapter_name)
    linear = _linear(sites)
    ranks = {name: rank(site, config) for name, site in linear.items()}
    if isinstance(prepare_layer_inputs_fn, Mapping) and (unknown := prepare_layer_inputs_fn.keys() - ranks.keys()):
        raise ConfigError(f"`prepare_layer_inputs_fn` names {', '.join(sorted(unknown))}, where no adapter will be")
    most = max((round(config.start["rho"] * r) for r in ranks.values()), default=0)
    components = {name: min(most, site.in_features) for name, site in linear.items()}
    looks = Looks(base, components, prepare_layer_inputs_fn)
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


def _require_eva(model: nn.Module, name: str) -> Adapter:
    """The adapter of this name, if it can be given start values now."""
    adapted = of(model)
    adapter = adapted._adapter(name)
    if getattr(adapter.config, "init_lora_weights", None) != "eva":
        raise ConfigError(f'{name!r} is not of `init_lora_weights="eva"`')
    if merged := adapted._lorafx.ledger.names:
        raise AdapterError(f"{', '.join(map(repr, merged))} merged into the base: call `unmerge_adapter()` first")
    return adapter


def _asked(model: nn.Module, config: Any, name: str) -> tuple[nn.Module, Any, Iterable[Site]]:
    """The base to run, and the config and sites to run it for: an adapter's, or those of a config for a base."""
    if config is None:
        adapter = _require_eva(model, name)
        return of(model)._lorafx.base, adapter.config, adapter.selection
    if isinstance(model, AdaptedModel):
        raise ConfigError("`peft_config` is for a base; the adapters of this model have configs: give `adapter_name`")
    config = with_experts(model, config_of(config))
    if getattr(config, "init_lora_weights", None) != "eva":
        raise ConfigError('this is for a `LoraConfig` of `init_lora_weights="eva"`')
    return model, config, select(model, config)


def _linear(sites: Iterable[Site]) -> dict[str, Site]:
    """Those that get their start values from data, by the names of their modules."""
    return {site.module: site for site in sites if site.reading in (LINEAR, CONV1D) and site.named == site.module}


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


def _give(model: AdaptedModel, name: str, found: Mapping[str, Tensor]) -> None:
    """Have an adapter be one of the ranks and values that were found."""
    adapted = of(model)
    adapter, active = adapted._adapter(name), adapted.active_adapters
    config: Any = adapter.config
    sites = _linear(adapter.selection)
    _require_fit(name, sites, found)
    given = {sites[module]: rows for module, rows in found.items()}
    if rest := sorted(site.name for site in adapter.selection if site not in given):
        warn(f"there is nothing for {', '.join(rest)}, which keep the start values they had: EVA is for linear layers")
    ranks = {site: len(given[site]) if site in given else rank(site, config) for site in adapter.selection}
    changed = _redistributed(adapted.tree, config, ranks)
    plan(mirrored(adapted.tree), name, changed)  # which refuses what cannot be, before anything is changed
    kept = {
        site: {suffix: tensor.clone() for suffix, tensor in adapter.tensors_at(adapted.tree, site).items()}
        for site in adapter.selection
    }
    # The new one gets the dtype of the old, which may have been chosen for it.
    is_wide = any(tensor.dtype == torch.float32 for tensors in kept.values() for tensor in tensors.values())
    adapted.delete_adapter(name)
    adapted.add_adapter(name, changed, autocast_adapter_dtype=is_wide)
    adapted._lorafx.given.add(name)
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


def _redistributed(root: nn.Module, config: Any, ranks: Mapping[Site, int]) -> Any:
    """The config for these ranks: without those of rank 0, and with α that keeps the scale of each."""
    alphas = {site: pattern_value(config.alpha_pattern, site.named, config.lora_alpha) for site in ranks}
    if config.start["adjust_scaling_factors"]:
        alphas = {site: alphas[site] * r / rank(site, config) for site, r in ranks.items()}
    left = [site for site, r in ranks.items() if r]
    names = list(dict.fromkeys(site.named for site in left if not site.is_parameter))
    shared = Counter(ending for site in ranks for ending in endings(site.named))

    def key(name: str) -> str:  # a pattern is for all names that end so
        return f"^{re.escape(name)}" if shared[name] > 1 else name

    return config.replace(
        **targets_by_name(root, names),
        rank_pattern={key(site.named): ranks[site] for site in left if ranks[site] != config.r},
        alpha_pattern={key(site.named): alphas[site] for site in left if alphas[site] != config.lora_alpha},
    )
