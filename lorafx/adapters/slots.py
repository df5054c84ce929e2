"""Slots: adapters that take the values of others while graphs run, which see no more than other numbers.

A slot has tensors at every site that one of the others adapts, with room for the largest rank (`room.py`), and its
scaling is a tensor. Its config is that of the adapter it holds. Sites that this one does not adapt are *idle*: their
tensors are zeros, and no part of its file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from ..tree.lookup import module_at, tensor_at
from .adapter import Adapter
from .building import build, device_of
from .kinds import Spec
from .room import fill, has_room, held
from .site import Site

# Fields of a config about an adapter's origin, start values and choice of modules: with the same sites and tensors, two
# adapters that differ in these alone compute the same.
_ORIGIN = {"inference_mode", "base_model_name_or_path", "revision", "task_type", "auto_mapping", "peft_version"}
_START = {"init_lora_weights", "loftq_config", "eva_config", "corda_config"}
_NAMES = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"}


def used(adapter: Adapter) -> Adapter:
    """The adapter without the sites that it leaves idle."""
    if not adapter.idle:
        return adapter
    weights = [site.weight for site in adapter.selection if site.name not in adapter.idle]
    return replace(adapter.restricted_to(weights, adapter.replaced), idle=frozenset())


def idles(adapter: Adapter) -> bool:
    """Whether it does nothing at a site where its tensors are zeros, which are that site's own."""
    return adapter.kind.idles and not adapter.shared


def without_room(adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of an adapter, by path, of its own rank: as they are, or views (copies, where a layer has groups)."""
    own = {path: (spec.shape, adapter.kind.blocks(site)) for site, spec, path in _places(adapter)}
    return {path: held(tensor, *own[path]) if path in own else tensor for path, tensor in tensors.items()}


def put(root: nn.Module, adapter: Adapter, values: Mapping[str, Tensor]) -> None:
    """Write values into tensors of an adapter, in place, by path; what room there is beyond them becomes zeros.

    Tensors on the meta device are made anew, where the base's are. Raises `AdapterError` if these are on it, too.
    """
    groups = {path: adapter.kind.blocks(site) for site, _, path in _places(adapter)}
    with torch.inference_mode(False):
        for path, base in adapter.bases.items():
            if path in values and tensor_at(root, path).is_meta:
                _give_memory(root, path, device_of(root, base))
        for path, value in values.items():
            fill(tensor_at(root, path), value, groups.get(path, 1))


def _give_memory(root: nn.Module, path: str, device: torch.device) -> None:
    if device.type == "meta":
        raise AdapterError(f"{path} is on the meta device, as the base is: load the base's values first")
    outer, _, name = path.rpartition(".")
    owner, tensor = module_at(root, outer), tensor_at(root, path)
    made = torch.empty_like(tensor, device=device)
    if isinstance(tensor, nn.Parameter):
        owner._parameters[name] = nn.Parameter(made, tensor.requires_grad)
    else:
        owner._buffers[name] = made


def differences(known: Adapter, found: Adapter, sizes: bool = True) -> list[str]:
    """The fields of their configs, but for sites and tensors, in which two adapters differ; with those about sizes."""
    about_sizes = set() if sizes else set(known.kind.sized(known.config))
    starts = _START if known.kind is found.kind else set()  # some say what trains, too
    ignored = _ORIGIN | starts | _NAMES | {*known.kind.about_values} | about_sizes
    old, new = (a.config.to_dict() for a in (known, found))
    return [key for key in old if key not in ignored and old[key] != new.get(key)]


def require_swappable(root: nn.Module, slot: Adapter, found: Adapter) -> None:
    """Raise `AdapterError`, saying what to do, if a slot cannot take the values of an adapter in the place of its own.

    One that adapts fewer sites fits if tensors of zeros do nothing.
    """
    cannot = f"{slot.name!r} cannot take the values of this adapter: "
    if found.config.peft_type != slot.config.peft_type:
        raise AdapterError(f"{cannot}it is of type {found.config.peft_type}, the slot of {slot.config.peft_type}")
    if differ := differences(slot, found, sizes=False):
        raise AdapterError(f"{cannot}they differ in {', '.join(differ)}; delete {slot.name!r} and load the other")
    if slot.takes_from_base or found.takes_from_base:
        raise AdapterError(f"{cannot}start values were taken out of the base, which would have to change with them")
    if slot.replaced.keys() != found.replaced.keys():
        one = min(slot.replaced.keys() ^ found.replaced.keys())
        raise AdapterError(f"{cannot}one of them alone trains {one} as a whole")
    _require_sites(slot, found, cannot)
    for site, spec, path in _places(found):
        room = tuple(tensor_at(root, path).shape)
        if not has_room(room, spec.shape):
            raise AdapterError(
                f"{cannot}{site.name}.{spec.suffix} is {spec.shape}, and there is room for {room}; call "
                "`prepare_model_for_compiled_hotswap(model, target_rank=…)` with the largest rank first"
            )


def _require_sites(slot: Adapter, found: Adapter, cannot: str) -> None:
    if beyond := [site.name for site in found.selection if site.name not in slot.tensors]:
        raise AdapterError(
            f"{cannot}it adapts {', '.join(beyond)}, for which the slot has no tensors; call "
            "`prepare_model_for_compiled_hotswap(model, config=…)` with the configs of all that will come first"
        )
    left_out = [site.name for site in slot.selection if site.name not in found.tensors]
    if left_out and not idles(slot):
        kind = slot.config.peft_type
        raise AdapterError(f"{cannot}it does not adapt {', '.join(left_out)}, and {kind} has no values that do nothing")


def widened(
    root: nn.Module, slot: Adapter, others: Iterable[Adapter], r: int | None
) -> tuple[Adapter, dict[str, Tensor]]:
    """The adapter with room for rank `r` (None: for its own), and with the sites of `others`, which are idle as yet.

    With it come the tensors that are to take the places of its own, by path. Nothing is changed. Raises `AdapterError`
    for an adapter of a larger rank.
    """
    config = slot.config if r is None else slot.kind.of_rank(slot.config, r)
    made: dict[str, Tensor] = {}
    for site in slot.selection:
        for spec in slot.kind.tensors(site, config).values():
            own = tensor_at(root, slot.tensors[site.name][spec.suffix])
            shape = tuple(own.shape) if r is None else spec.shape
            if not has_room(shape, tuple(own.shape)):
                raise AdapterError(
                    f"{slot.name!r} has {site.name}.{spec.suffix} of {tuple(own.shape)}, for which target_rank={r} "
                    "leaves no room"
                )
            if shape != tuple(own.shape):
                fill(room := own.new_zeros(shape), own, slot.kind.blocks(site))
                made[slot.tensors[site.name][spec.suffix]] = nn.Parameter(room, own.requires_grad)
    selection, tensors = slot.selection, dict(slot.tensors)
    for other in others:
        selection |= other.selection
        tensors |= {name: paths for name, paths in other.tensors.items() if name not in tensors}
    idle = slot.idle | (tensors.keys() - slot.tensors.keys())
    return replace(slot, selection=selection, tensors=tensors, idle=idle), made


def add_idle(root: nn.Module, slot: Adapter, planned: Iterable[Adapter], autocast_adapter_dtype: bool) -> None:
    """Make tensors of zeros for the sites of `planned` adapters that a slot has none for yet."""
    known = set(slot.tensors)
    for other in planned:
        fresh = other.restricted_to([site.weight for site in other.selection if site.name not in known], ())
        known |= set(fresh.tensors)
        zeros = {path: torch.zeros(spec.shape, device="cpu") for _, spec, path in _places(fresh)}
        build(root, fresh, values=zeros, autocast_adapter_dtype=autocast_adapter_dtype)


def _places(adapter: Adapter) -> Iterator[tuple[Site, Spec, str]]:
    """Each tensor of an adapter at its sites: the site, what there is to say of it, and its path."""
    for site in adapter.selection:
        for spec in adapter.specs(site).values():
            yield site, spec, adapter.tensors[site.name][spec.suffix]
