"""Experts by the names of layers: what a config means by `w1` or `gate_proj` where these are stacked in a parameter.

transformers 4 had a layer for each projection of each expert, and configs go on naming these. transformers 5 has them
in one parameter, with projections of one input below one another. As PEFT does, a config that means such layers gets
their parameters instead (`target_parameters`), each with the ranks of as many projections as it has.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from ..errors import ConfigError, warn
from .config import AdapterConfig, is_named, is_pattern_of
from .mismatches import can_be_adapted
from .selection import matcher

# What the projections of experts, and routers, were called, by the ending of the parameter that has them now; by the
# type of model that had these names first. PEFT knows the same.
_ROUTER = {"gate.weight": ("gate",)}
_NAMES = {
    "mixtral": {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",), **_ROUTER},
    "qwen2_moe": {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",), **_ROUTER},
}


class Stack(NamedTuple):
    """A parameter by its path and the ending of that, with the names of the layers that were its parts, by their last.

    Of the layers of experts there is one name with an expert's number, and one without.
    """

    path: str
    ending: str
    parts: dict[str, list[str]]


def with_experts(model: nn.Module, config: AdapterConfig) -> AdapterConfig:
    """The config with parameters in place of the experts' layers and routers that it means; itself if it means none.

    Warns of other layers of the same names, which are left out as PEFT leaves them out. Raises `ConfigError` where some
    of a parameter's projections are meant and not all, or have a rank or alpha of their own.
    """
    stacks = list(_stacks(model)) if config.target_modules and hasattr(config, "target_parameters") else []
    stacks = _meant(stacks, model, config) if stacks else []
    if not stacks:
        return config
    _require_no_patterns(stacks, config)
    targets = _targets(stacks, model, config)
    if left := [path for path in _layers(model, config) if not is_named(targets, path)]:
        warn(
            f"`target_modules` means this model's experts, which are parameters here. As in PEFT {left[0]}"
            + (f" and {len(left) - 1} other layers" if len(left) > 1 else "")
            + " of the same names are left out: list them by their full names to adapt them, too"
        )
    parameters = (*(config.target_parameters or ()), *_endings(stacks, model))  # type: ignore[attr-defined]
    return config.replace(
        target_modules=targets, target_parameters=tuple(dict.fromkeys(parameters)), **_sizes(stacks, config)
    )


def _stacks(model: nn.Module) -> Iterator[Stack]:
    names = _NAMES.get(_family(model), {})
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            whole = f"{path}.{name}"
            ending = next((each for each in names if is_named((each,), whole)), None)
            if ending is None or parameter is None or can_be_adapted(module):
                continue
            if ending in _ROUTER:
                yield Stack(whole, ending, {"gate": [path]})
            elif parameter.ndim == 3:
                yield Stack(whole, ending, {last: [f"{path}.{last}", f"{path}.0.{last}"] for last in names[ending]})


def _family(model: nn.Module) -> str:
    """The type of model after whose rules transformers reads the checkpoints of this one; empty if it has its own."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return ""
    from ..torch_private.loading import family  # imports transformers, which a model of its own has done

    return family(model.config.model_type)


def _meant(stacks: list[Stack], model: nn.Module, config: AdapterConfig) -> list[Stack]:
    """Those of which the config means the parts; `ConfigError` where it means some of them."""
    # Every linear layer was one of an expert, too, but for those that are excluded.
    means, meant = matcher(model, config.replace(target_modules=".*") if config.all_linear else config), []
    for stack in stacks:
        if is_named(config.exclude_modules, stack.path) or is_named(
            config.exclude_modules, stack.path.rpartition(".")[0]
        ):
            continue  # by their names of today
        parts = [last for last, names in stack.parts.items() if any(map(means, names))]
        if missing := [last for last in stack.parts if last not in parts] if parts else []:
            raise ConfigError(
                f"`target_modules` means {', '.join(parts)} of the experts without {', '.join(missing)}, and "
                f"{stack.path} has both in one parameter: name both or neither of them"
            )
        meant += [stack] if parts else []
    return meant


def _require_no_patterns(stacks: list[Stack], config: AdapterConfig) -> None:
    """Raise `ConfigError` for a rank or alpha of a layer that is a part of a parameter."""
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern, stack in itertools.product(getattr(config, field), stacks):
            is_of_part = any(is_pattern_of(pattern, name) for names in stack.parts.values() for name in names)
            if is_of_part and not is_pattern_of(pattern, stack.path):
                raise ConfigError(
                    f"`{field}` has {pattern!r} for a part of {stack.path}, which is one parameter: name that, as "
                    f"{_pattern(stack)!r} does"
                )


def _targets(stacks: list[Stack], model: nn.Module, config: AdapterConfig) -> tuple[str, ...]:
    """`target_modules` without what means parts of these: of a regex or "all-linear", the names that are left."""
    parts = [name for stack in stacks for names in stack.parts.values() for name in names]
    if not isinstance(config.target_modules, str):
        return tuple(each for each in config.target_modules or () if not any(is_named((each,), name) for name in parts))
    last = {name.rpartition(".")[2] for name in parts}
    layers = [path for path in _layers(model, config) if path.rpartition(".")[2] not in last]
    others = {
        path.rpartition(".")[2] for path, _ in model.named_modules(remove_duplicate=False) if path not in {*layers}
    }
    return tuple(
        dict.fromkeys(path if path.rpartition(".")[2] in others else path.rpartition(".")[2] for path in layers)
    )


def _layers(model: nn.Module, config: AdapterConfig) -> list[str]:
    """The names of the layers that the config means and that there are."""
    means = matcher(model, config)
    modules = model.named_modules(remove_duplicate=False)
    return [path for path, module in modules if path and can_be_adapted(module) and means(path)]


def _endings(stacks: list[Stack], model: nn.Module) -> list[str]:
    """Names of the parameters for `target_parameters`: endings where all that end so are meant."""
    chosen = {stack.path for stack in stacks}
    others = [path for path, _ in model.named_parameters() if path not in chosen]
    return [stack.path if any(is_named((stack.ending,), path) for path in others) else stack.ending for stack in stacks]


def _sizes(stacks: list[Stack], config: Any) -> dict[str, dict[str, float]]:
    """The ranks and alphas of parameters that have several parts: those of the config, as often."""
    several = {_pattern(stack): len(stack.parts) for stack in stacks if len(stack.parts) > 1}
    return {
        "rank_pattern": config.rank_pattern | {pattern: config.r * parts for pattern, parts in several.items()},
        "alpha_pattern": config.alpha_pattern
        | {pattern: config.lora_alpha * parts for pattern, parts in several.items()},
    }


def _pattern(stack: Stack) -> str:
    return rf".*\.{re.escape(stack.ending)}"
