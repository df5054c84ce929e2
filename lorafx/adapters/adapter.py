"""An adapter: one named set of tensors for a selection. It knows where its tensors hang; the tree owns them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..errors import AdapterError, ConfigError
from ..tree.attached import attach, detach
from ..tree.lookup import find_tensor, tensor_at
from .config import LoraConfig
from .kinds import Kind, kind_of
from .selection import Selection, Site, saved_modules, select

SAVED, TRAINED_BIAS = "modules_to_save", "trained_bias"
_WIDENED = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Adapter:
    """What an adapter is, and the paths of its tensors.

    `tensors` maps a site's name to its tensors' paths by suffix. `replaced` maps the path of a base tensor to the path
    of the adapter's own trainable copy, which graphs read instead: biases (`bias=`) and `modules_to_save`.
    """

    name: str
    config: LoraConfig
    kind: Kind
    selection: Selection
    tensors: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    replaced: Mapping[str, str] = field(default_factory=dict)

    @property
    def paths(self) -> Iterator[str]:
        """Paths of all tensors of the adapter."""
        for by_suffix in self.tensors.values():
            yield from by_suffix.values()
        yield from self.replaced.values()

    def tensors_at(self, root: nn.Module, site: Site) -> dict[str, Tensor]:
        """The adapter's tensors of a site, by suffix."""
        return {suffix: tensor_at(root, path) for suffix, path in self.tensors[site.name].items()}

    def sites_by_weight(self, root: nn.Module) -> dict[int, Site]:
        """The adapter's sites by the identity of their weight: two adapters may know a tied one by different names."""
        return {id(tensor_at(root, site.weight)): site for site in self.selection}

    def only(self, weights: Iterable[str], replaced: Iterable[str]) -> Adapter:
        """The adapter as far as it concerns these weights, and these base tensors that it replaces."""
        wanted, copies = set(weights), {base: self.replaced[base] for base in replaced if base in self.replaced}
        sites = Selection(tuple(site for site in self.selection if site.weight in wanted))
        return replace(self, selection=sites, tensors={s.name: self.tensors[s.name] for s in sites}, replaced=copies)

    def below(self, path: str) -> Adapter | None:
        """The part below the module at `path`, by relative names; None if it has tensors elsewhere, or adapts that."""
        within = f"{path}."
        if any(site.name == path for site in self.selection):
            return None
        sites = {site: site.name.removeprefix(within) for site in self.selection if site.name.startswith(within)}
        tensors = {sites[site]: self.tensors[site.name] for site in sites}
        replaced = {base: copy for base, copy in self.replaced.items() if base.startswith(within)}
        paths = [tensor for by_suffix in tensors.values() for tensor in by_suffix.values()]
        if not all(path.startswith(within) for path in (*paths, *replaced.values())):
            return None
        inner = {
            name: {suffix: tensor.removeprefix(within) for suffix, tensor in by_suffix.items()}
            for name, by_suffix in tensors.items()
        }
        copies = {base.removeprefix(within): copy.removeprefix(within) for base, copy in replaced.items()}
        selection = Selection(tuple(replace(site, name=name) for site, name in sites.items()))
        return replace(self, selection=selection, tensors=inner, replaced=copies)

    def signature(self, root: nn.Module) -> Hashable:
        """Equal for adapters whose equations and tensors are of one form, whatever the tensors' values."""
        return (
            self.name,
            self.config.inference_mode,
            tuple(sorted(self.replaced.items())),
            tuple(
                (
                    replace(site, tied=(), named=""),
                    tuple(self.kind.scalars(site, self.config).items()),
                    tuple(self.kind.names(site, self.config).items()),
                    tuple((s, t.shape, t.dtype) for s, t in self.tensors_at(root, site).items()),
                    root.get_submodule(site.name).training,
                )
                for site in self.selection
            ),
        )

    @property
    def owners(self) -> set[str]:
        """Paths of the modules below which all that the adapter reads and adapts can be found."""
        copies = {
            path.rpartition(f".{SAVED}.")[0] or path.rpartition(f".{TRAINED_BIAS}.")[0]
            for path in self.replaced.values()
        }
        return {site.name for site in self.selection} | copies

    def delta(self, root: nn.Module, site: Site) -> dict[str, Tensor]:
        """The change that the adapter makes to the site's base parameters, by their name, in float64."""
        tensors = {suffix: tensor.detach() for suffix, tensor in self.tensors_at(root, site).items()}
        return self.kind.delta(site, self.config, tensors)


def plan(root: nn.Module, name: str, config: LoraConfig) -> Adapter:
    """Decide what an adapter will be made of, touching nothing.

    Raises `ConfigError` or `SelectionError` for a config that cannot be served on this model, and `AdapterError` for a
    name that cannot be used.
    """
    if not name or set(name) & set("./\\") or hasattr(nn.Module(), name):
        raise AdapterError(f"{name!r} cannot name an adapter: no dots, no slashes, no name of a module's method")
    if config.unsupported:
        asked = ", ".join(f"{key}={value!r}" for key, value in config.unsupported.items())
        raise ConfigError(f"lorafx does not implement this yet, and will not ignore it: {asked}")
    kind = kind_of(config.peft_type)
    selection = select(root, config)
    for site in selection:
        kind.check(site, config)
    tensors = {
        site.name: {suffix: _placed(site.name, suffix, name) for suffix in kind.shapes(site, config)}
        for site in selection
    }
    return Adapter(name, config, kind, selection, tensors, dict(_replacements(root, name, config, selection)))


def _placed(owner: str, suffix: str, name: str) -> str:
    """Where a tensor hangs: PEFT's own rule, the adapter's name after the suffix's first part."""
    first, dot, rest = suffix.partition(".")
    return f"{owner}.{first}.{name}{dot}{rest}"


def _replacements(root: nn.Module, name: str, config: LoraConfig, selection: Selection) -> Iterator[tuple[str, str]]:
    saved = saved_modules(root, config)
    for module in saved:
        inner = root.get_submodule(module)
        for path in [*dict(inner.named_parameters()), *dict(inner.named_buffers())]:
            yield f"{module}.{path}", f"{module}.{SAVED}.{name}.{path}"
    for path in _trained_biases(root, config, selection):
        if not any(path.startswith(f"{module}.") for module in saved):
            owner, _, last = path.rpartition(".")
            yield path, f"{owner}.{TRAINED_BIAS}.{name}.{last}"


def _trained_biases(root: nn.Module, config: LoraConfig, selection: Selection) -> list[str]:
    """Paths of the biases to train; as in PEFT, what goes by another name (`bias_ih_l0`, `in_proj_bias`) is none."""
    if config.bias == "lora_only":
        return [site.bias for site in selection if site.has_bias and site.form.bias == "bias"]
    if config.bias == "all":
        return [path for path, _ in root.named_parameters() if path.rpartition(".")[2] == "bias"]
    return []


def build(
    root: nn.Module,
    adapter: Adapter,
    *,
    random_state: int | None = None,
    autocast_adapter_dtype: bool = True,
    on_meta: bool = False,
    values: Mapping[str, Tensor] | None = None,
) -> None:
    """Make the adapter's tensors and hang them in the tree, beside what they adapt.

    Tensors take the base weight's device, and its dtype, or float32 for a half-precision base if
    `autocast_adapter_dtype`. They start with `values`, by path, where those are given (an adapter that is loaded), else
    with the kind's start values: `random_state` seeds a generator for them, None uses torch's global one.
    """
    rng = None if random_state is None else torch.Generator().manual_seed(random_state)
    made: dict[str, nn.Parameter] = {}
    for site in adapter.selection:
        weight = root.get_parameter(site.weight)
        dtype = torch.float32 if autocast_adapter_dtype and weight.dtype in _WIDENED else weight.dtype
        device = torch.device("meta") if on_meta else weight.device
        paths = adapter.tensors[site.name]
        tensors = {s: values[p] for s, p in paths.items()} if values else _start_values(adapter, site, rng, device)
        for suffix, path in paths.items():
            made[path] = nn.Parameter(tensors[suffix].detach().to(device, dtype, copy=True))
    for base, path in adapter.replaced.items():
        tensor = tensor_at(root, base)
        start = (values[path] if values else tensor).detach().to(tensor.device, tensor.dtype, copy=True)
        made[path] = nn.Parameter(start, requires_grad=tensor.is_floating_point())
    hung: list[str] = []
    try:
        for path, parameter in made.items():
            attach(root, path, parameter)
            hung.append(path)
    except BaseException:
        detach(root, hung)
        raise


def _start_values(adapter: Adapter, site: Site, rng: torch.Generator | None, device: torch.device) -> dict[str, Tensor]:
    where = "meta" if device.type == "meta" else "cpu"  # one stream of random numbers, whatever the device
    shapes = adapter.kind.shapes(site, adapter.config)
    tensors = {suffix: torch.empty(shape, device=where) for suffix, shape in shapes.items()}
    adapter.kind.init(site, adapter.config, tensors, None if where == "meta" else rng)
    return tensors


def remove(root: nn.Module, adapter: Adapter) -> None:
    """Take the adapter's tensors out of the tree."""
    detach(root, adapter.paths)


def trainable_paths(root: nn.Module, adapters: Iterable[Adapter]) -> list[str]:
    """Paths of the tensors that these adapters train: all of floating point, unless in inference mode."""
    paths = [path for adapter in adapters if not adapter.config.inference_mode for path in adapter.paths]
    return [path for path in paths if (t := find_tensor(root, path)) is not None and t.is_floating_point()]
