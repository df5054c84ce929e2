"""Building: an adapter's tensors are made and hung in the tree, beside what they adapt."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from ..tree.attached import attach, attach_module, detach
from ..tree.lookup import tensor_at
from ..tree.wrappers import loading_device
from .adapter import Adapter
from .kinds import SCALING, Spec
from .planning import placed
from .site import Site
from .start_values import Rests, drawn, start_values, unsaved

_WIDENED = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


@torch.inference_mode(False)  # or nobody could ever train what is made for calls that only infer
def build(
    root: nn.Module,
    adapter: Adapter,
    *,
    random_state: int | None = None,
    autocast_adapter_dtype: bool = True,
    on_meta: bool = False,
    values: Mapping[str, Tensor] | None = None,
) -> Rests:
    """Make the adapter's tensors and hang them in the tree, beside what they adapt: all of them or none.

    A site's tensors take its weight's dtype and device (where it is in a call, if accelerate keeps it elsewhere); with
    `autocast_adapter_dtype` float32 if that is a float of 16 or 8 bits; with `on_meta` all that a state dict has take
    the meta device, but for those that are taken out of the base. Copies of base tensors take device and dtype from
    those. Values are `values`, by path, if given (of an adapter that is loaded), else the kind's start values or the
    base's: `random_state` seeds a generator for them, None uses torch's global one. Raises `AdapterError` for a copy of
    a tensor that accelerate has offloaded, or start values taken out of one.

    Returns what is to be left of base weights that start values are taken out of, also where these give way to
    `values`. It is not written yet.
    """
    rng = None if random_state is None else torch.Generator().manual_seed(random_state)
    made: dict[str, Tensor] = {}
    rests: Rests = {}
    for site in adapter.selection:
        specs, paths = adapter.kind.tensors(site, adapter.config), adapter.tensors[site.name]
        takes, tensors = adapter.kind.takes_from_base(site, adapter.config), dict[str, Tensor]()
        if takes or not values:
            whole = takes or not on_meta or not all(spec.saved for spec in specs.values())
            where = device_of(root, site.weight).type if whole else "meta"
            tensors, rest = start_values(root, adapter.kind, adapter.config, site, rng, where)
            rests |= {site: rest} if rest else {}
            if where == "meta" and not all(spec.saved for spec in specs.values()):
                tensors |= unsaved(root, adapter, site)
        for spec in specs.values():
            value = values[paths[spec.suffix]] if values else tensors[spec.suffix]
            to_meta = on_meta and spec.saved and not takes
            device = torch.device("meta") if to_meta else device_of(root, site.weight)
            device = device if spec.saved else _with_values(value, device)
            made[paths[spec.suffix]] = _made(root, site, spec, value, autocast_adapter_dtype, device)
    made |= dict(_shared(root, adapter, values, autocast_adapter_dtype))
    transient = set(_in_no_state_dict(adapter))
    _hang(root, made | dict(_copies(root, adapter, values)), transient)
    for site in [site for site in adapter.selection if device_of(root, site.weight).type == "meta"]:
        for path in transient.intersection(adapter.tensors[site.name].values()):
            root.get_submodule(path.rpartition(".")[0]).to("meta")  # which keeps the values for when it leaves meta
    return rests


def _made(root: nn.Module, site: Site, spec: Spec, value: Tensor, widened: bool, device: torch.device) -> Tensor:
    """A tensor of a site as it is in the tree: a parameter, or a buffer if nothing trains it."""
    dtype = site.storage.dtype(root.get_submodule(site.module), site.parameter)
    dtype = spec.dtype or (torch.float32 if widened and dtype in _WIDENED else dtype)
    made = value.detach().to(device, dtype, copy=True)
    return made if spec.fixed else nn.Parameter(made)


def _with_values(value: Tensor, device: torch.device) -> torch.device:
    """Where to make what no state dict brings: on its weight's device, but not without values on the meta device."""
    return value.device if device.type == "meta" else device


def _shared(
    root: nn.Module, adapter: Adapter, values: Mapping[str, Tensor] | None, widened: bool
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that sites share, by path: one object for each device and dtype that their weights have."""
    start = drawn(adapter.kind, adapter.config, adapter.shared) if adapter.shared and not values else {}
    made: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
    for site in adapter.selection:
        dtype = site.storage.dtype(root.get_submodule(site.module), site.parameter)
        for spec in adapter.shared.values():
            path = adapter.tensors[site.name][spec.suffix]
            key = spec.suffix, device_of(root, site.weight), dtype
            if key not in made:
                value = values[path] if values else start[spec.suffix]
                made[key] = _made(root, site, spec, value, widened, _with_values(value, key[1]))
            yield path, made[key]


def _in_no_state_dict(adapter: Adapter) -> Iterator[str]:
    """Paths of the tensors that are made again, or loaded from an adapter's file, and no part of a model's state."""
    for site in adapter.selection:
        for name, spec in adapter.specs(site).items():
            if name in adapter.shared or not spec.saved:
                yield adapter.tensors[site.name][spec.suffix]


def _copies(root: nn.Module, adapter: Adapter, values: Mapping[str, Tensor] | None) -> Iterator[tuple[str, Tensor]]:
    """The adapter's copies of base tensors, by path."""
    for base, path in adapter.replaced.items():
        tensor = tensor_at(root, base)
        start = (values[path] if values else tensor).detach().to(tensor.device, tensor.dtype, copy=True)
        yield path, nn.Parameter(start) if isinstance(tensor, nn.Parameter) and start.is_floating_point() else start
        if tensor.is_meta and device_of(root, base) != tensor.device:
            raise AdapterError(
                f"{base} is offloaded by accelerate, and cannot be trained as a whole: leave it out of "
                "`modules_to_save` and `bias`, or load the base without offloading"
            )


def _hang(root: nn.Module, made: Mapping[str, Tensor], transient: Collection[str]) -> None:
    """Hang tensors in the tree, by path: all of them or none. One that has several paths is in one module."""
    owners: dict[int, nn.Module] = {}
    hung: list[str] = []
    try:
        for path, tensor in made.items():
            if id(tensor) in owners:
                attach_module(root, path.rpartition(".")[0], owners[id(tensor)])
            else:
                owners[id(tensor)] = attach(root, path, tensor, persistent=path not in transient)
            hung.append(path)
    except BaseException:
        detach(root, hung)
        raise


def device_of(root: nn.Module, path: str) -> torch.device:
    """Where a tensor of the tree is while its module's forward runs."""
    loaded = loading_device(root.get_submodule(path.rpartition(".")[0]))
    return tensor_at(root, path).device if loaded is None else torch.device(loaded)


def scaled(root: nn.Module, adapter: Adapter, factor: float) -> Adapter:
    """The adapter with its scaling set to `factor` times what its config says, as a tensor that graphs read.

    The first call makes these tensors, one for each site where the kind has a scaling; further ones only write to them,
    so that no graph changes.
    """
    numbers = {site: adapter.kind.numbers(site, adapter.config) for site in adapter.selection}
    values = {site.name: found[SCALING] for site, found in numbers.items() if SCALING in found}
    scales = dict(adapter.scales)
    for site in [site for site in adapter.selection if site.name in values]:
        if site.name not in scales:
            dense = site.storage.dtype(root.get_submodule(site.module), site.parameter)
            dtype = torch.promote_types(dense, torch.float32) if dense.is_floating_point else torch.float32
            path = placed(site, "adapter_scaling", adapter.name)
            attach(root, path, torch.zeros((), dtype=dtype, device=device_of(root, site.weight)))
            scales[site.name] = path
        tensor_at(root, scales[site.name]).fill_(values[site.name] * factor)  # type: ignore[operator]
    return replace(adapter, scales=scales)
