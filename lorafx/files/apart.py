"""Adapters that have apart what a model has in one: experts with a linear layer each, as transformers 4 had them.

    W = [[G₁; U₁], …, [Gₑ; Uₑ]]        ΔW[e] = s · blockdiag(B_G, B_U)[e] · [A_G; A_U][e]

transformers stacks the weights of experts when it reads a checkpoint, and puts projections of one input below one
another. An adapter of the layers that were there becomes one of the stacked parameter, which computes the same: of as
many ranks as it was made of. Where a module was renamed only, its tensors are. A config that names layers which are
parameters now names these instead (`target_parameters`).
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters.config import AdapterConfig, is_named
from ..adapters.expert_names import with_experts
from ..adapters.experts import stacks
from ..adapters.storages import weights_of
from ..errors import CheckpointError, warn

_PAIR = re.compile(r"base_model\.model\.(?P<layer>.+)\.(?P<factor>lora_[AB])\.weight")
_NO_DROPOUT = "`lora_dropout` is 0 for the whole adapter"
# What transformers does to experts: one after the other along a new dimension, projections below one another.
_STACKED, _BELOW = ("MergeModulelist", 0), ("Concatenate", 1)
Pair = dict[str, Tensor]  # `lora_A` and `lora_B` of a layer


class Joined(NamedTuple):
    """A file's config for a model's parameters, its other tensors by key, and the pair of each parameter by path."""

    config: AdapterConfig
    tensors: dict[str, Tensor]
    parameters: dict[str, Pair]


def joined(root: nn.Module, config: AdapterConfig, tensors: Mapping[str, Tensor]) -> Joined:
    """A file's adapter for the model as transformers reads it now; as it is where it has nothing apart.

    Raises `CheckpointError` for parts that have no common pair.
    """
    layers = _layers_that_are_gone(root, tensors)
    if not layers or not config.takes_parameters:
        return Joined(config, dict(tensors), {})
    from ..torch_private.loading import Loading  # imports transformers, which a model of its own has done

    loading = Loading(root, [f"{layer}.weight" for layer in layers])  # type: ignore[arg-type]
    if not loading.conversions:
        return Joined(config, dict(tensors), {})
    paths, parameters = {key.removesuffix(".weight"): name for key, name in loading.names.items()}, {}
    gone = {layer for conversion in loading.conversions for layer in _layers(conversion.patterns)}
    for conversion in loading.conversions:
        _require_plain(config, conversion.name, _layers(conversion.patterns))
        rows = _by_pattern(conversion.patterns, conversion.converter.source_patterns, layers)
        _require_stacking(root, config, conversion.name, conversion.converter.operations, rows)
        parameters[conversion.name] = _stacked([list(experts.values()) for experts in rows])
    renamed = {layer: name.removesuffix(".weight") for layer, name in paths.items()}
    kept = {_renamed(key, renamed): value for key, value in tensors.items() if _layer(key) not in gone}
    named = [*parameters, *(f"{path}.weight" for path in renamed.values() if not _is_layer(root, path))]
    config = config.replace(target_modules=_targets(root, config, renamed.values()))
    return Joined(_config(root, config, named, parameters), kept, parameters)


def meant(root: nn.Module, config: AdapterConfig, tensors: Mapping[str, Tensor]) -> AdapterConfig:
    """A config that somebody gives for a file, with the stacked parameters that the file has and it names as layers."""
    there = {_layer(key).replace(".base_layer", "") for key in tensors}
    return with_experts(root, config) if any(stack.module in there for stack in stacks(root)) else config


def _layer(key: str) -> str:
    found = _PAIR.fullmatch(key)
    return found["layer"] if found else ""


def _layers(keys: Iterable[str]) -> list[str]:
    return [key.removesuffix(".weight") for key in keys]


def _layers_that_are_gone(root: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Pair]:
    """The pairs of layers that a model of transformers has as layers no more, by the layers' names."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(root, transformers.PreTrainedModel):
        return {}
    pairs: dict[str, Pair] = {}
    for key, tensor in tensors.items():
        if (found := _PAIR.fullmatch(key)) and "base_layer" not in found["layer"].split("."):
            pairs.setdefault(found["layer"], {})[found["factor"]] = tensor
    there = {path for path, module in root.named_modules(remove_duplicate=False) if any(weights_of(module))}
    return {layer: pair for layer, pair in pairs.items() if layer not in there and len(pair) == 2}


def _is_layer(root: nn.Module, path: str) -> bool:
    return any(weights_of(root.get_submodule(path)))


def _by_pattern(patterns: Mapping[str, str], order: Sequence[str], layers: Mapping[str, Pair]) -> list[dict[str, Pair]]:
    """For each pattern, in its rule's order, the pairs of its layers by name, expert by expert."""
    named = [(key.removesuffix(".weight"), each) for key, each in patterns.items()]
    return [{layer: layers[layer] for layer, each in named if each == one} for one in order]


def _require_plain(config: AdapterConfig, name: str, layers: Sequence[str]) -> None:
    """Raise `CheckpointError` where the layers that become one parameter have ranks or scales of their own."""
    patterns = [*getattr(config, "rank_pattern", ()), *getattr(config, "alpha_pattern", ())]
    if any(re.fullmatch(rf"(.*\.)?({pattern})", layer) for pattern in patterns for layer in layers):
        raise CheckpointError(
            f"the adapter has {layers[0]} and {len(layers) - 1} more by themselves, with a `rank_pattern` or "
            f"`alpha_pattern`, and the model has them as one parameter, {name}, with one rank: load it with the "
            "transformers that it was trained with, and merge it there"
        )


def _require_stacking(
    root: nn.Module, config: AdapterConfig, name: str, operations: Sequence[object], rows: list[dict[str, Pair]]
) -> None:
    """Raise `CheckpointError` for parts that are not simply put below one another, or of which some are missing."""
    how = {(type(each).__name__, getattr(each, "dim", None)) for each in operations}
    simple = {_STACKED} <= how <= {_STACKED, _BELOW}
    experts = [*range(root.get_parameter(name).shape[0])]
    whole = all([_expert(layer) for layer in row] == experts for row in rows)
    inner = {tuple(pair["lora_A"].shape) for row in rows for pair in row.values()}
    outer = all(len({tuple(pair["lora_B"].shape) for pair in row.values()}) == 1 for row in rows)
    if not (simple and whole and len(inner) == 1 and inner.pop()[0] == config.r and outer):  # type: ignore[attr-defined]
        raise CheckpointError(
            f"the adapter's parts of {name}, which the model has as one parameter, are none that fit together: there "
            f"must be one of rank `r` for each projection of its {len(experts)} experts. Load it with the transformers "
            "that it was trained with, and merge it there"
        )


def _expert(layer: str) -> int:
    """The number of the expert that a layer is of."""
    return int(next(atom for atom in reversed(layer.split(".")) if atom.isdigit()))


def _stacked(rows: list[list[Pair]]) -> Pair:
    """The pair of a parameter, as PEFT keeps it: (experts · r, in), by expert, and (out, r · experts), by rank."""
    experts = list(zip(*rows))
    a = torch.cat([pair["lora_A"] for parts in experts for pair in parts])
    b = torch.stack([torch.block_diag(*(pair["lora_B"] for pair in parts)) for parts in experts], dim=-1)
    return {"lora_A": a, "lora_B": b.flatten(1)}


def _renamed(key: str, names: Mapping[str, str]) -> str:
    layer = _layer(key)
    return key.replace(layer, names[layer], 1) if layer in names else key


def _config(
    root: nn.Module, config: AdapterConfig, named: Sequence[str], parameters: Mapping[str, Pair]
) -> AdapterConfig:
    """The config for the model's parameters: each of as many ranks as it has parts, and scaled as these were."""
    ranks, alphas = dict(config.rank_pattern), dict(config.alpha_pattern)  # type: ignore[attr-defined]
    for name, pair in parameters.items():
        rank = pair["lora_A"].shape[0] // root.get_parameter(name).shape[0]
        parts = rank / config.r  # type: ignore[attr-defined]
        if parts != 1:
            ranks[re.escape(name)] = rank
            grown = math.sqrt(parts) if config.use_rslora else parts  # type: ignore[attr-defined]
            alphas[re.escape(name)] = config.lora_alpha * grown  # type: ignore[attr-defined]
    changes: dict[str, Any] = {"rank_pattern": ranks, "alpha_pattern": alphas}
    if parameters and config.lora_dropout:  # type: ignore[attr-defined]
        warn(f"the experts' adapters are those of stacked parameters here, which have no dropout: {_NO_DROPOUT}")
        changes["lora_dropout"] = 0.0
    return config.replace(**changes, target_parameters=tuple(dict.fromkeys((*config.parameters, *named))))


def _targets(root: nn.Module, config: AdapterConfig, renamed: Iterable[str]) -> Any:
    """`target_modules` without what means no layer of the model, and with layers whose names in the file are others."""
    targets, modules = config.target_modules, dict(root.named_modules(remove_duplicate=False))
    if targets is None or config.all_linear:
        return targets
    layers = [path for path in modules if _is_layer(root, path)]
    if isinstance(targets, str):  # a regex, which may mean experts, too
        meant = [path for path in layers if is_named(targets, path)]
    else:
        meant = [each for each in targets if any(is_named((each,), path) for path in layers)]
    return (*meant, *(path for path in renamed if path in layers and not is_named(meant, path)))
