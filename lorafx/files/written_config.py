"""The config that is written beside an adapter's weights: all that another process needs to make the adapter again.

Names are written out where the config in use leaves them to the model, as "all-linear" does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from ..adapters.adapter import Adapter
from ..adapters.config import AdapterConfig, is_named
from ..adapters.experts import names_of_experts
from ..adapters.tying import input_embedding, tied_to_embedding
from ..tree.lookup import endings
from ..tree.mirror import MIRRORED_AS

# The version of PEFT whose format is written, for PEFT's own checks of age.
FORMAT = "0.21.2"
ROWS = "token_adapter."  # below a module's name, what a file has of rows that train


def written_config(root: nn.Module, adapter: Adapter) -> dict[str, Any]:
    """The fields as a folder has them."""
    values = adapter.config.to_dict()
    if _is_expanded(root, adapter):
        values |= targets_by_name(root, sorted(_targeted(root, adapter)))
    if twins := _twins(adapter):
        values["target_modules"] = _with_names(values["target_modules"], twins)
    values["inference_mode"] = True
    if "fan_in_fan_out" in values:
        readings = {site.reading for site in adapter.selection}
        values["fan_in_fan_out"] = any(reading.transposed and not reading.lookup for reading in readings)
    values["base_model_name_or_path"] = values["base_model_name_or_path"] or name_of(root)
    values["peft_version"] = values["peft_version"] or FORMAT
    if values["task_type"] is None and values["auto_mapping"] is None:
        cls = getattr(type(root), MIRRORED_AS, type(root))
        values["auto_mapping"] = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
    return values


def unread_by_peft(root: nn.Module, adapter: Adapter) -> Iterator[str]:
    """What to say of layers that PEFT would take for experts when it reads the folder."""
    experts = names_of_experts(root) if adapter.config.takes_parameters else ()
    sites = [site.name for site in adapter.selection if not site.is_parameter]
    if named := [name for name in sites if name.rpartition(".")[2] in experts]:
        yield (
            f"PEFT takes the name of {named[0]} for that of this model's experts, and would not find it in the file: "
            f"to have PEFT read this adapter, name {named[0]}.weight in `target_parameters` instead, and its like"
        )


def without_trained_rows(root: nn.Module, config: AdapterConfig, keys: Iterable[str]) -> AdapterConfig:
    """The config of a file with these keys, without targets of which the file has trained rows and nothing else.

    lorafx has written folders that name such an embedding in `target_modules`, too.
    """
    targets, besides = config.target_modules, config.besides(input_embedding(root))
    if not besides or targets is None or isinstance(targets, str):
        return config
    names = [name for name, _ in root.named_modules(remove_duplicate=False) if is_named(besides, name)]
    have = {name: [key for key in keys if f".{name}." in key] for name in names}
    of_rows = [name for name, own in have.items() if own and all(f".{name}.{ROWS}" in key for key in own)]
    return config.replace(target_modules=[each for each in targets if each not in of_rows])


def _targeted(root: nn.Module, adapter: Adapter) -> Iterator[str]:
    """The sites that are there because of `target_modules`, by name: other fields of the config ask for the rest."""
    besides = adapter.config.besides(input_embedding(root))
    for site in adapter.selection:
        if not site.is_parameter and not any(is_named(besides, name) for name in (site.named, *site.tied)):
            yield site.name


def _is_expanded(root: nn.Module, adapter: Adapter) -> bool:
    """Whether the config leaves names to the model, or has that of a module whose weight is saved by a tie."""
    config = adapter.config
    tied = tied_to_embedding(root) if config.ties else ()
    saved = {base.rpartition(".")[0] for base in adapter.replaced}
    names = config.target_modules
    return config.all_linear or names is None or any(name in saved and is_named(names, name) for name in tied)


def _twins(adapter: Adapter) -> list[str]:
    """The modules that have one adapter by a tie: where not all are targets, PEFT may leave the others alone."""
    tied = [site for site in adapter.selection if site.tied and adapter.kind.repeats(site, adapter.config)]
    return [name for site in tied for name in (site.named, *site.tied)]


def _with_names(targets: str | Sequence[str], names: Sequence[str]) -> str | list[str]:
    """Targets, as a regex or as endings of names, and further names."""
    further = [name for name in names if not is_named(targets, name)]
    if isinstance(targets, str):
        return "|".join([f"(?:{targets})", *map(re.escape, further)]) if further else targets
    return [*targets, *further]


def name_of(model: nn.Module) -> str | None:
    """The name or path that a model of transformers was loaded from."""
    return getattr(getattr(model, "config", None), "name_or_path", None) or None


def targets_by_name(root: nn.Module, sites: list[str]) -> dict[str, Any]:
    """Config fields that select exactly these sites: their names, or a regex if other modules' names end in one."""
    chosen = set(sites)
    others = {name for name, _ in root.named_modules(remove_duplicate=False)} - chosen
    if chosen.isdisjoint(ending for name in others for ending in endings(name)):
        return {"target_modules": sites}
    # PEFT refuses `layers_to_transform` beside a regex; whole names do not need it.
    return {"target_modules": "|".join(map(re.escape, sites)), "layers_to_transform": None, "layers_pattern": None}
