"""Preprocessing: what data says of a base's weights before they are adapted, for LoRA that starts from that.

Both run the base as whoever calls them does, look at the layers that a config would adapt, and note what they found
beside each weight (`adapters/notes.py`); `compile` and `add_adapter` find it there.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.config import AdapterConfig
from ..adapters.expert_names import with_experts
from ..adapters.kinds import config_of
from ..adapters.kinds.lora_subconfigs import CORDA_FILES
from ..adapters.notes import note
from ..adapters.readings import CONV1D, LINEAR
from ..adapters.selection import select
from ..adapters.site import Site
from ..adapters.storages import DENSE
from ..errors import AdapterError, ConfigError, warn
from ..tree.lookup import tensor_at
from ..tree.modes import in_mode
from ..tree.wrappers import innermost

Config = AdapterConfig | Mapping[str, Any] | Any


@torch.no_grad()
def preprocess_corda(model: nn.Module, lora_config: Config, run_model: Callable[[], object]) -> None:
    """Look at what the layers of a base are given, for `init_lora_weights="corda"`, as PEFT's function does.

    Call it before `lorafx.compile(model, lora_config)`, and keep the weights as they are in between. Of each linear
    layer that the config adapts it keeps C = mean(xᵀ x), (in, in) in float32, while the base lives.

    Args:
        run_model: runs the base, in eval mode, on sample data: some hundred sequences of text, say. Each call of a
            layer counts as one sample, which is divided by its largest number.

    Raises `ConfigError` for a config that does not ask for this, and a layer that is not linear or is quantised;
    `SelectionError` where the config fits nothing; `AdapterError` for a layer that was not called, or was given numbers
    that are not finite.
    """
    sums: dict[str, list[Any]] = {}
    with _prepared(model, lora_config, "corda", training=False) as sites, contextlib.ExitStack() as hooks:
        for site in sites:
            sums[site.name] = [0, 0]
            look = functools.partial(_look, sums[site.name])
            hook = model.get_submodule(site.module).register_forward_pre_hook(look, with_kwargs=True)
            hooks.callback(hook.remove)
        run_model()
    for site in sites:
        total, count = sums[site.name]
        _require_seen(site, count, total)
        note(tensor_at(model, site.weight), "corda", total / count)


def _look(sums: list[Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    x = rows_of(given(args, kwargs)).detach().float()
    if not x.numel():
        return
    x = x / x.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    sums[0], sums[1] = sums[0] + x.t() @ x, sums[1] + 1


def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a linear layer is called with, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def rows_of(x: Tensor) -> Tensor:
    """(…, in) -> (n, in)"""
    return x.reshape(-1, x.shape[-1])


def preprocess_loraga(model: nn.Module, lora_config: Config, train_step: Callable[[], object]) -> None:
    """Look at the gradients of a base's weights, for `init_lora_weights="lora_ga"`, as PEFT's function does.

    Call it before `lorafx.compile(model, lora_config)`, and keep the weights as they are in between. Of each linear
    layer that the config adapts it keeps the mean gradient of its weight over all calls of `backward`, in float32,
    while the base lives.

    Args:
        train_step: runs the base, in training mode, forward and backward on sample data, once or several times. Only
            the weights that will be adapted get a gradient, which is taken away at once: steps of an optimizer change
            nothing, and whether gradients are cleared makes no difference.

    Raises as `preprocess_corda`; gradients that weights already had, and which parameters train, are as before.
    """
    with _prepared(model, lora_config, "lora_ga", training=True) as sites:
        weights = {site: tensor_at(model, site.weight) for site in sites}
        found = _gradients(model, list(weights.values()), train_step)
    for (site, weight), gradient in zip(weights.items(), found):
        _require_seen(site, int(gradient is not None), gradient)
        assert gradient is not None, "what was reached has one"
        note(weight, "lora_ga", gradient.t() if site.reading.transposed else gradient)


def _gradients(model: nn.Module, weights: list[Tensor], train_step: Callable[[], object]) -> list[Tensor | None]:
    """The mean gradients of these weights, in float32, by a function that calls backward."""
    before = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    sums: dict[Tensor, Tensor] = {}
    calls: Counter[Tensor] = Counter()

    def take(weight: Tensor) -> None:
        assert weight.grad is not None
        sums[weight] = sums.get(weight, 0) + weight.grad.float()
        calls[weight] += 1
        weight.grad = None

    hooks = [weight.register_post_accumulate_grad_hook(take) for weight in weights]
    try:
        for parameter in before:
            parameter.grad = None
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_()
        with torch.enable_grad():
            train_step()
        return [sums[weight] / calls[weight] if weight in sums else None for weight in weights]
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, (trains, gradient) in before.items():
            parameter.requires_grad_(trains)
            parameter.grad = gradient


@contextlib.contextmanager
def _prepared(model: nn.Module, lora_config: Config, init: str, training: bool) -> Iterator[list[Site]]:
    """The sites of a config for start values by this name, with the base in one mode; then as it was."""
    config: Any = with_experts(model, config_of(lora_config))
    if getattr(config, "init_lora_weights", None) != init:
        raise ConfigError(f'this is for a `LoraConfig` of `init_lora_weights="{init}"`')
    if hasattr(innermost(model), "peft_config"):
        raise AdapterError("the model is adapted already: look at the base, before `compile`")
    if ignored := [name for name in CORDA_FILES if config.start.get(name)]:
        warn(f"`corda_config`'s {', '.join(ignored)} have no effect here: what is found is kept in memory, in float32")
    sites = [site for site in select(model, config) if not site.reading.lookup]
    for site in sites:
        if site.reading not in (LINEAR, CONV1D) or site.storage != DENSE:
            raise ConfigError(f"{site.name}: `init_lora_weights={init!r}` is for linear layers that are not quantised")
    with in_mode(model, training):
        yield sites


def _require_seen(site: Site, count: int, found: Any) -> None:
    if not count:
        raise AdapterError(f"{site.name} was not reached by the calls: run data through it, or exclude it")
    if not found.isfinite().all():
        raise AdapterError(f"{site.name}: the data gives numbers that are not finite there")
    if not found.any():
        raise AdapterError(f"{site.name}: the data gives nothing but zeros there, which say nothing: exclude it")
