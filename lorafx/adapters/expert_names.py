"""Experts by the names of layers: what a config means by `w1` or `gate_proj` where these are stacked in a parameter.

As PEFT does, a config that means such layers gets their parameters instead (`target_parameters`), each with the ranks
of as many projections as it has.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..errors import ConfigError, warn
from .config import AdapterConfig, is_named, is_pattern_of
from .experts import ROUTER, Stack, names_of_experts, stacks
from .mismatches import can_be_adapted
from .selection import matcher


def with_experts(model: nn.Module, config: AdapterConfig) -> AdapterConfig:
    """The config with parameters in place of the experts' layers and routers that it means; itself if it means none.

    Names that mean experts alone which it excludes are left out. Warns of other layers of the same names, which are
    left out as PEFT leaves them out. Raises `ConfigError` where some of a parameter's projections are meant and not
    all, or have a rank or alpha of their own.
    """
    named = _named(model, config) if config.target_modules and config.takes_parameters else []
    meant = _meant(named, model, config) if named else []
    if not meant:
        return _without_idle(model, config, named)
    _require_no_patterns(meant, config)
    targets = _targets(meant, model, _without_idle(model, config, named))
    besides = [path for path in _layers(model, config) if not is_named(targets, path)]
    if left := [path for path in besides if not is_named(config.parameters, f"{path}.weight")]:
        warn(
            f"`target_modules` means this model's experts, which are parameters here. As in PEFT {left[0]}"
            + (f" and {len(left) - 1} other layers" if len(left) > 1 else "")
            + f" of the same names are left out: add {left[0]}.weight to `target_parameters`, and so on, to adapt them"
        )
    parameters = (*config.parameters, *_endings(meant, model))
    return config.replace(
        target_modules=targets, target_parameters=tuple(dict.fromkeys(parameters)), **_sizes(meant, config)
    )


def without_routers(model: nn.Module, config: AdapterConfig) -> AdapterConfig:
    """The config of a file without the router that PEFT names for "all-linear", in models that have no such."""
    if ROUTER not in config.parameters or not names_of_experts(model):
        return config
    if any(is_named((ROUTER,), path) for path, _ in model.named_parameters()):
        return config
    return config.replace(target_parameters=tuple(name for name in config.parameters if name != ROUTER))


def _named(model: nn.Module, config: AdapterConfig) -> list[Stack]:
    """The parameters whose parts `target_modules` names, in whatever layer, excluded or not."""
    if not (known := list(stacks(model))):
        return []
    everywhere = {"exclude_modules": None, "modules_to_save": None, "task_type": None}
    everywhere |= {"layers_to_transform": None, "layers_pattern": None}
    means = _meaning(model, config.replace(**everywhere))
    return [stack for stack in known if any(map(means, stack.names))]


def _meaning(model: nn.Module, config: AdapterConfig) -> Callable[[str], bool]:
    """Says of the name of a part whether the config means it: "all-linear" means all, for each was a linear layer."""
    return matcher(model, config.replace(target_modules=".*") if config.all_linear else config)


def _meant(named: list[Stack], model: nn.Module, config: AdapterConfig) -> list[Stack]:
    """Those of which the config means the parts; `ConfigError` where it means some of them."""
    means, meant = _meaning(model, config), []
    for stack in named:
        if stack.is_excluded(config):
            continue
        parts = [last for last, names in stack.parts.items() if any(map(means, names))]
        if missing := [last for last in stack.parts if last not in parts] if parts else []:
            raise ConfigError(
                f"`target_modules` means {', '.join(parts)} of the experts without {', '.join(missing)}, and "
                f"{stack.path} has both in one parameter: name both or neither of them"
            )
        meant += [stack] if parts else []
    return meant


def _without_idle(model: nn.Module, config: AdapterConfig, named: list[Stack]) -> AdapterConfig:
    """The config without those of a list of targets that mean experts and no module, if others are left."""
    if not named or isinstance(config.target_modules, str):
        return config
    modules = [path for path, _ in model.named_modules(remove_duplicate=False)]
    left = tuple(
        each
        for each in config.target_modules or ()
        if any(is_named((each,), path) for path in modules) or not _is_of(named, each)
    )
    return config.replace(target_modules=left) if left and left != config.target_modules else config


def _is_of(named: list[Stack], target: str) -> bool:
    """Whether a target names parts of these, be it those of any expert."""
    first = re.sub(r"(^|\.)\d+\.(\w+)$", r"\g<1>0.\2", target)  # the same of the first expert, "3.w1" -> "0.w1"
    return any(is_named((first,), name) for stack in named for name in stack.names)


def _require_no_patterns(meant: list[Stack], config: AdapterConfig) -> None:
    """Raise `ConfigError` for a rank or alpha of a layer that is a part of a parameter."""
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern, stack in itertools.product(getattr(config, field), meant):
            is_of_part = any(is_pattern_of(pattern, name) for name in stack.names)
            if is_of_part and not is_pattern_of(pattern, stack.path):
                raise ConfigError(
                    f"`{field}` has {pattern!r} for a part of {stack.path}, which is one parameter: name that, as "
                    f"{_pattern(stack)!r} does"
                )


def _targets(meant: list[Stack], model: nn.Module, config: AdapterConfig) -> tuple[str, ...]:
    """`target_modules` without what means parts of these: of a regex or "all-linear", the names that are left."""
    if not isinstance(config.target_modules, str):
        return tuple(each for each in config.target_modules or () if not _is_of(meant, each))
    last = {name.rpartition(".")[2] for stack in meant for name in stack.names}
    layers = [path for path in _layers(model, config) if path.rpartition(".")[2] not in last]
    rest = {path for path, _ in model.named_modules(remove_duplicate=False)} - {*layers}
    others = {path.rpartition(".")[2] for path in rest}
    endings = {path: path.rpartition(".")[2] for path in layers}
    return tuple(dict.fromkeys(path if ending in others else ending for path, ending in endings.items()))


def _layers(model: nn.Module, config: AdapterConfig) -> list[str]:
    """The names of the layers that the config means and that there are."""
    means = matcher(model, config)
    modules = model.named_modules(remove_duplicate=False)
    return [path for path, module in modules if path and can_be_adapted(module) and means(path)]


def _endings(meant: list[Stack], model: nn.Module) -> list[str]:
    """Names of the parameters for `target_parameters`: endings where all that end so are meant."""
    chosen = {stack.path for stack in meant}
    others = [path for path, _ in model.named_parameters() if path not in chosen]
    return [stack.path if any(is_named((stack.ending,), path) for path in others) else stack.ending for stack in meant]


def _sizes(meant: list[Stack], config: Any) -> dict[str, Mapping[str, float]]:
    """The ranks and alphas of parameters that have several parts: those of the config, as often, or their own."""
    ranks, alphas = dict(config.rank_pattern), dict(config.alpha_pattern)
    for stack in (each for each in meant if len(each.parts) > 1):
        for patterns, value, own in (
            (ranks, config.r, config.rank_pattern),
            (alphas, config.lora_alpha, config.alpha_pattern),
        ):
            if not any(is_pattern_of(pattern, stack.path) for pattern in own):
                patterns.setdefault(_pattern(stack), value * len(stack.parts))
    return {"rank_pattern": ranks, "alpha_pattern": alphas}


def _pattern(stack: Stack) -> str:
    return rf".*\.{re.escape(stack.ending)}"
