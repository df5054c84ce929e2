"""Planning: which sites and tensors an adapter will have, and whether a model can serve it, before anything is made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from ..errors import ConfigError, SelectionError, warn
from ..graph.modules import taken_names
from ..tree.lookup import tensor_at
from ..tree.replication import layers_of_others
from .adapter import SAVED, TRAINED_BIAS, Adapter
from .config import AdapterConfig
from .kinds import Kind, Operands, kind_of
from .naming import require_usable
from .selection import saved_modules, select, whole_modules
from .site import Selection, Site
from .storages import DENSE, weights_of
from .tying import with_twins

SHARED = "shared"  # what a tensor is called in the module that all of its sites have below them


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
