"""An adapter: one named set of tensors for a selection. It knows the paths of its tensors; the tree owns them."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from ..errors import AdapterError
from ..tree.attached import detach
from ..tree.lookup import Ways, find_tensors, module_at, tensor_at
from .config import AdapterConfig
from .kinds import SCALING, Kind, Operands, Spec
from .site import Selection, Site
from .storages import DENSE

SAVED, TRAINED_BIAS = "modules_to_save", "trained_bias"
ANY_SCALE = "/any scale"  # follows a name where the scaling is a tensor; no name has a slash


@dataclass(frozen=True)
class Adapter:
    """What an adapter is, and the paths of its tensors.

    `tensors` maps a site's name to the paths of its tensors by suffix (`lora_A.weight`). `replaced` maps the path of a
    base tensor to the path of the adapter's own trainable copy, which graphs read instead: biases (`bias=`) and
    `modules_to_save`, where modules whose weight stays tied have one. `scales` maps a site's name to the path of its
    scaling, once `scaled` has made that a tensor. `idle` has the names of sites at which a slot that holds the adapter
    has tensors and the adapter none (`slots.py`). `shared` are the tensors that all sites share, by the kind's name for
    them; each has a path at each site.
    """

    name: str
    config: AdapterConfig
    kind: Kind
    selection: Selection
    tensors: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    replaced: Mapping[str, str] = field(default_factory=dict)
    scales: Mapping[str, str] = field(default_factory=dict)
    idle: frozenset[str] = frozenset()
    shared: Mapping[str, Spec] = field(default_factory=dict)

    def specs(self, site: Site) -> dict[str, Spec]:
        """The tensors at a site, by the kind's names for them: its own, and those that it shares with all others."""
        return self.kind.tensors(site, self.config) | dict(self.shared)

    @property
    def paths(self) -> Iterator[str]:
        """Paths of all tensors of the adapter."""
        for by_suffix in self.tensors.values():
            yield from by_suffix.values()
        yield from dict.fromkeys(self.replaced.values())  # modules whose weight is tied may have one
        yield from self.scales.values()

    @functools.cached_property
    def bases(self) -> dict[str, str]:
        """The path of the base tensor that each tensor of the adapter is for."""
        found = {copy: base for base, copy in self.replaced.items()}
        for site in self.selection:
            found |= dict.fromkeys(self.tensors[site.name].values(), site.weight)
            found |= {self.scales[site.name]: site.weight} if site.name in self.scales else {}
        return found

    @functools.cached_property
    def ways(self) -> Ways:
        """The ways to all tensors of the adapter, as `paths` has them."""
        return Ways(self.paths)

    def is_like(self, other: Adapter) -> bool:
        """Whether its equations are another's at every site, of tensors by other names, shapes and all."""
        return (
            self.kind is other.kind
            and self.config.equation == other.config.equation
            and (self.idle, self.shared) == (other.idle, other.shared)
            and (self.scales.keys(), self.replaced.keys()) == (other.scales.keys(), other.replaced.keys())
            and self.selection.sites == other.selection.sites
        )

    @property
    def takes_from_base(self) -> bool:
        """Whether its start values at some site are taken out of the base weight."""
        return any(self.kind.takes_from_base(site, self.config) for site in self.selection)

    @property
    def call_key(self) -> str:
        """What the call key says of the adapter: its name, and whether its scaling is a tensor."""
        return self.name + ANY_SCALE if self.scales else self.name

    def tensors_at(self, root: nn.Module, site: Site) -> dict[str, Tensor]:
        """The adapter's tensors of a site, by suffix."""
        return {suffix: tensor_at(root, path) for suffix, path in self.tensors[site.name].items()}

    def sites_by_weight(self, root: nn.Module) -> dict[int, Site]:
        """The adapter's sites by the identity of their weight: two adapters may know a tied one by different names."""
        return {id(tensor_at(root, site.weight)): site for site in self.selection}

    def restricted_to(self, weights: Iterable[str], replaced: Iterable[str]) -> Adapter:
        """The part of the adapter at sites with these weights, and its copies of these base tensors."""
        wanted, copies = set(weights), {base: self.replaced[base] for base in replaced if base in self.replaced}
        sites = Selection(tuple(site for site in self.selection if site.weight in wanted))
        tensors = {site.name: self.tensors[site.name] for site in sites}
        scales = {site.name: self.scales[site.name] for site in sites if site.name in self.scales}
        return replace(self, selection=sites, tensors=tensors, replaced=copies, scales=scales)

    def relative_to(self, path: str) -> Adapter | None:
        """The part of the adapter below the module at `path`, with paths relative to it.

        None if the module itself is a site, or if that part has a tensor outside the module.
        """
        within = f"{path}."
        if any(site.module == path for site in self.selection):
            return None
        inner = Selection(
            tuple(
                replace(site, module=site.module.removeprefix(within))
                for site in self.selection
                if site.module.startswith(within)
            )
        )
        tensors = {site.name: self.tensors[within + site.name] for site in inner}
        scales = {site.name: self.scales[within + site.name] for site in inner if within + site.name in self.scales}
        replaced = {base: copy for base, copy in self.replaced.items() if base.startswith(within)}
        paths = [tensor for by_suffix in tensors.values() for tensor in by_suffix.values()]
        if not all(path.startswith(within) for path in (*paths, *scales.values(), *replaced.values())):
            return None
        return replace(
            self,
            selection=inner,
            tensors={name: _relative(by_suffix, within) for name, by_suffix in tensors.items()},
            replaced={base.removeprefix(within): copy for base, copy in _relative(replaced, within).items()},
            scales=_relative(scales, within),
        )

    def require_in_place(self, root: nn.Module) -> None:
        """Raise `AdapterError` if modules that its tensors hang below were replaced since, or weights resized."""
        own = dict(zip(self.ways.paths, self.ways.tensors(root)))
        if gone := [path for path, tensor in own.items() if tensor is None]:
            sites = {path: site for site, by_suffix in self.tensors.items() for path in by_suffix.values()}
            owners = sites | {copy: base for base, copy in self.replaced.items()}
            owners |= {path: site for site, path in self.scales.items()}
            lost = dict.fromkeys(owners[path] for path in gone)
            raise AdapterError(
                f"{', '.join(lost)}: replaced or taken away since the adapter {self.name!r} was put there, and its "
                "tensors with them; delete the adapter, or change the model before adapting it"
            )
        shapes = {site.weight: site.weight_shape for site in self.selection if site.storage == DENSE}
        shapes |= {base: tuple(tensor_at(root, copy).shape) for base, copy in self.replaced.items()}
        found = zip(shapes.items(), find_tensors(root, shapes))
        if resized := [path for (path, shape), tensor in found if _is_resized(tensor, shape)]:
            raise AdapterError(
                f"{', '.join(resized)}: of another size than when the adapter {self.name!r} was put there, as after "
                "`resize_token_embeddings`; delete the adapter, or resize the model before adapting it"
            )
        on_meta = [path for path, tensor in own.items() if _is_meta(tensor)]
        bases = find_tensors(root, [self.bases[path] for path in on_meta]) if on_meta else []
        if bare := next((path for path, base in zip(on_meta, bases) if not _is_meta(base)), None):
            raise AdapterError(
                f"{bare} is on the meta device, which holds no values: give the adapter {self.name!r} its values by "
                "`load_adapter`, or those of the model by `load_state_dict(…, assign=True)`"
            )

    def signature(self, root: nn.Module) -> Hashable:
        """A key that is equal for adapters with the same equations and shapes, whatever the tensors' values."""
        return self.name, tuple(sorted(self.replaced.items())), self.form(root)

    def form(self, root: nn.Module) -> Hashable:
        """A key that is equal for adapters at the same places, of the same shapes, dtypes and numbers, by any name."""
        return (
            self.config.inference_mode,
            tuple(self.replaced),
            tuple(
                (
                    replace(site, tied=(), named=""),
                    tuple(self.kind.numbers(site, self.config).items()),
                    tuple((s, t.shape, t.dtype, t.device) for s, t in self.tensors_at(root, site).items()),
                    site.name in self.scales,
                    module_at(root, site.module).training,
                )
                for site in self.selection
            ),
        )

    def numbers(self, root: nn.Module, site: Site) -> dict[str, float]:
        """The numbers of the kind's equation at a site, with the scaling as it is now."""
        numbers = dict(self.kind.numbers(site, self.config))
        scale = tensor_at(root, self.scales[site.name]) if site.name in self.scales else None
        if scale is not None and not scale.is_meta:
            numbers[SCALING] = float(scale)
        return numbers

    def is_rescaled(self, root: nn.Module) -> bool:
        """Whether its scaling is another than its config says."""
        sites = [site for site in self.selection if site.name in self.scales]
        pairs = [(self.numbers(root, site)[SCALING], self.kind.numbers(site, self.config)[SCALING]) for site in sites]
        return not all(math.isclose(now, then, rel_tol=1e-6) for now, then in pairs)

    def operands(self, site: Site, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]) -> Operands:
        """What the kind's `merged` is given at a site: `tensors` (by suffix) in its dtype, and `numbers`."""
        named = {name: tensors[spec.suffix].detach() for name, spec in self.specs(site).items()}
        return Operands(site, self.config, named, numbers)

    @property
    def owners(self) -> set[str]:
        """Paths of the modules that hold everything the adapter adapts or reads."""
        among = [f".{name}." for name in (SAVED, TRAINED_BIAS, self.kind.whole) if name]
        copies = {path.rpartition(name)[0] for path in self.replaced.values() for name in among if name in path}
        bases = {base.rpartition(".")[0] for base in self.replaced}
        return {site.module for site in self.selection} | copies | bases


def _is_meta(tensor: Tensor | None) -> bool:
    return tensor is None or tensor.is_meta


def _is_resized(tensor: Tensor | None, shape: tuple[int, ...]) -> bool:
    """Whether a tensor has another shape; what shards a model may flatten it, or leave nothing of it here."""
    return tensor is not None and tensor.ndim == len(shape) and tuple(tensor.shape) != shape and tensor.numel() > 0


def _relative(paths: Mapping[str, str], within: str) -> dict[str, str]:
    return {name: path.removeprefix(within) for name, path in paths.items()}


def remove(root: nn.Module, adapter: Adapter) -> None:
    """Take the adapter's tensors out of the tree."""
    detach(root, adapter.paths)
