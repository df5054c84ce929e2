"""An adapter: one named set of tensors for a selection. It knows the paths of its tensors; the tree owns them."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from ..errors import AdapterError, ConfigError, SelectionError, warn
from ..graph.modules import taken_names
from ..tree.attached import detach
from ..tree.lookup import Ways, find_tensors, module_at, tensor_at
from ..tree.replication import layers_of_others
from .config import AdapterConfig
from .kinds import SCALING, Kind, Operands, Spec, kind_of
from .naming import require_usable
from .selection import saved_modules, select, whole_modules
from .site import Selection, Site
from .storages import DENSE, weights_of
from .tying import with_twins

SAVED, TRAINED_BIAS = "modules_to_save", "trained_bias"
SHARED = "shared"  # what a tensor is called in the module that all of its sites have below them


@dataclass(frozen=True)
class Adapter:
    """What an adapter is, and the paths of its tensors.

    `tensors` maps a site's name to the paths of its tensors by suffix (`lora_A.weight`). `replaced` maps the path of a
    base tensor to the path of the adapter's own trainable copy, which graphs read instead: biases (`bias=`) and
    `modules_to_save`, where modules whose weight stays tied have one. `scales` maps a site's name to the path of its
    scaling, once `scaled` has made that a tensor.
    `idle` has the names of sites at which a slot that holds the adapter has tensors and the adapter none (`slots.py`).
    `shared` are the tensors that all sites share, by the kind's name for them; each has a path at each site.
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
        return f"{self.name}, of any scale" if self.scales else self.name

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


def plan(root: nn.Module, name: str, config: AdapterConfig) -> Adapter:
    """Decide which sites and tensors an adapter will have; nothing is made or changed yet.

    Raises `ConfigError` or `SelectionError` for a config that cannot be served on this model, and `AdapterError` for a
    name that cannot be used.
    """
    require_usable(name)
    if config.unsupported:
        asked = ", ".join(f"{key}={value!r}" for key, value in config.unsupported.items())
        raise ConfigError(f"lorafx does not implement this yet, and will not ignore it: {asked}")
    _require_layers(root, config)
    kind = kind_of(config)
    config = kind.settled(config, getattr(getattr(root, "config", None), "model_type", None))
    selection = Selection() if kind.whole else select(root, config)
    whole = whole_modules(root, config) if kind.whole else ()
    _require_numbers(root, selection)
    _require_weights(kind, selection, config)
    for site in selection:
        kind.check(site, config)
    _require_unshared(kind, config, selection)
    _require_one_sequence(root, kind, config)
    for remark in kind.remarks(selection, config):
        warn(remark)
    _require_free_names(kind, config, selection)
    _require_readable(root, selection)
    _require_dense(root, (*saved_modules(root, config), *whole))
    shared = kind.shared(selection, config) if selection else {}
    tensors = {
        site.name: {spec.suffix: placed(site, spec.suffix, name) for spec in kind.tensors(site, config).values()}
        | {spec.suffix: f"{placed(site, spec.suffix, name)}.{SHARED}" for spec in shared.values()}
        for site in selection
    }
    replaced = dict(_copies_of(root, whole, f"{kind.whole}.{name}")) | dict(
        _replacements(root, name, config, selection)
    )
    return Adapter(name, config, kind, selection, tensors, replaced, shared=shared)


def _require_layers(root: nn.Module, config: AdapterConfig) -> None:
    """Raise `ConfigError` unless the model has the layers that the config asks for."""
    found = layers_of_others(root)
    if config.replicates != found:
        has = f"was made with {[list(pair) for pair in found]}" if found else "has its own layers"
        raise ConfigError(
            f"`layer_replication` is {[list(pair) for pair in config.replicates] or None}, and the model {has}: all "
            "adapters of a model have the same, which `compile` and `load` put there with the first; a checkpoint on "
            "disk keeps the layers that it has"
        )


def _require_unshared(kind: Kind, config: AdapterConfig, selection: Selection) -> None:
    """Raise `ConfigError` for what would change weights that layers share."""
    bias, taken = getattr(config, "bias", "none"), any(kind.takes_from_base(site, config) for site in selection)
    if config.replicates and (bias != "none" or taken):
        what = "start values that are taken out of these" if bias == "none" else f"`bias={bias!r}`"
        raise ConfigError(f"`layer_replication` makes layers that share their weights, and {what} would change those")


def _require_one_sequence(root: nn.Module, kind: Kind, config: AdapterConfig) -> None:
    """Raise `ConfigError` for what acts on some tokens, where an encoder's and a decoder's are not the same ones."""
    if kind.invocation(config) and getattr(getattr(root, "config", None), "is_encoder_decoder", False):
        raise ConfigError(
            f"an adapter that acts from {kind.invocation(config)} on is for models of one sequence, and "
            f"{type(root).__name__} has an encoder's and a decoder's"
        )


def _require_free_names(kind: Kind, config: AdapterConfig, selection: Selection) -> None:
    """Raise `ConfigError` for a kind whose tensors or numbers have names that mean something else in an equation."""
    taken = {"x", "y", "dtype", "result_dtype", *dir(Operands), *Operands.__dataclass_fields__}
    for site in selection:
        names = {*kind.tensors(site, config), *kind.shared(selection, config), *kind.numbers(site, config)}
        if wrong := sorted(names & taken):
            raise ConfigError(f"kinds cannot call their tensors or numbers {', '.join(wrong)}; {config.peft_type} does")


def _require_readable(root: nn.Module, selection: Selection) -> None:
    """Raise `SelectionError` for a site below a module whose name graphs use for something else, and cannot read by."""
    taken = set(taken_names(root))
    if site := next((site for site in selection if site.module.partition(".")[0] in taken), None):
        name = site.module.partition(".")[0]
        raise SelectionError(
            f"{site.name} cannot be adapted: the model's root has a `{name}`, and so has every torch.fx.GraphModule. "
            "Give that module another name, or make the model a child of another one"
        )


def _require_numbers(root: nn.Module, selection: Selection) -> None:
    """Raise `SelectionError` for a weight of integers, which is a quantised one that no storage knows."""
    for site in selection:
        weight = tensor_at(root, site.weight)
        if site.storage == DENSE and not (weight.is_floating_point() or weight.is_complex()):
            owner = type(root.get_submodule(site.module))
            raise SelectionError(
                f"{site.name} ({owner.__module__}.{owner.__name__}) keeps its weight as {weight.dtype}, as quantised "
                "layers do, and no storage here knows that one. Leave it out, load the base unquantised, or teach "
                "lorafx its layout: `lorafx.adapters.storages.register`"
            )


def _require_weights(kind: Kind, selection: Selection, config: AdapterConfig) -> None:
    """Raise `ConfigError` for a kind that needs the base's weight where nobody but the module can read it."""
    needed = [site for site in selection if kind.needs_weight(site) or kind.starts_from_weight]
    hidden = [site for site in needed if not site.storage.readable]
    if hidden:
        raise ConfigError(
            f"{config.peft_type} computes with the base's weight, and that of {hidden[0].name} (stored as "
            f"{hidden[0].storage}) cannot be read by anyone but the layer; leave it out, or load the base unquantised"
        )


def _require_dense(root: nn.Module, saved: Iterable[str]) -> None:
    """Raise `ConfigError` for a module to train as a whole whose weights are kept in a way that cannot be trained."""
    for path in saved:
        for name, module in root.get_submodule(path).named_modules(prefix=path):
            if packed := next((storage for *_, storage in weights_of(module) if storage.lossy), None):
                raise ConfigError(
                    f"`modules_to_save` would train {name}, whose weight is stored as {packed}: leave it dense"
                )
            for last, parameter in module._parameters.items():
                if parameter is not None and not (parameter.is_floating_point() or parameter.is_complex()):
                    raise ConfigError(
                        f"`modules_to_save` would train {name}, which keeps {last} as {parameter.dtype}: leave it out"
                    )


def placed(site: Site, suffix: str, name: str) -> str:
    """The path of a tensor, by PEFT's rule: the adapter's name follows the suffix's first part, `lora_A.default.…`.

    For a weight that is not its module's usual one, the first part begins with the weight's name.
    """
    first, dot, rest = suffix.partition(".")
    of_weight = "" if site.name == site.module else f"{site.parameter}_"
    return f"{site.module}.{of_weight}{first}.{name}{dot}{rest}"


def _replacements(root: nn.Module, name: str, config: AdapterConfig, selection: Selection) -> Iterator[tuple[str, str]]:
    saved = saved_modules(root, config)
    copies = dict(_copies_of(root, saved, f"{SAVED}.{name}"))
    yield from (with_twins(root, copies, f"{SAVED}.{name}") if config.ties else copies).items()
    for path in _trained_biases(root, config, selection):
        if not any(path.startswith(f"{module}.") for module in saved):
            owner, _, last = path.rpartition(".")
            yield path, f"{owner}.{TRAINED_BIAS}.{name}.{last}"


def _copies_of(root: nn.Module, modules: Iterable[str], below: str) -> Iterator[tuple[str, str]]:
    """The tensors of whole modules, each with the path of a copy that hangs in its module at `below`."""
    for module in modules:
        inner = root.get_submodule(module)
        for path in [*dict(inner.named_parameters()), *dict(inner.named_buffers())]:
            yield f"{module}.{path}", f"{module}.{below}.{path}"


def _trained_biases(root: nn.Module, config: AdapterConfig, selection: Selection) -> list[str]:
    """Paths of the biases to train: as in PEFT only those named `bias`, not `bias_ih_l0` or `in_proj_bias`."""
    asked = getattr(config, "bias", "none")
    if asked == "all":
        return [path for path, _ in root.named_parameters() if path.rpartition(".")[2] == "bias"]
    if asked != "none":  # those of the adapted modules alone, "lora_only" for LoRA
        return [site.bias for site in selection if site.has_bias and site.reading.bias == "bias"]
    return []


def remove(root: nn.Module, adapter: Adapter) -> None:
    """Take the adapter's tensors out of the tree."""
    detach(root, adapter.paths)
