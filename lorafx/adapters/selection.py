"""Which weights a config picks: the selection, resolved on the module tree before any graph exists."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from torch import nn

from ..errors import ConfigError, SelectionError, warn
from ..tree.lookup import tensor_at
from ..tree.own_layers import TOKEN
from .config import AdapterConfig, is_named, is_saved
from .experts import stacks
from .mismatches import COMPUTED, can_be_adapted, candidates, is_computed, nearest, nothing_message, unfit_message
from .parameters import Named, experts_left, named_parameters
from .readings import CONV1D, LINEAR, Reading
from .site import Selection, Site
from .storages import DENSE, Storage, weights_of
from .tying import input_embedding, tied_to_embedding

CLASSIFIER_HEADS = ("classifier", "score")
# The modules that PEFT trains as a whole for a task, where the model has them.
TASK_HEADS = {"SEQ_CLS": CLASSIFIER_HEADS, "TOKEN_CLS": CLASSIFIER_HEADS, "QUESTION_ANS": ("qa_outputs",)}


def select(model: nn.Module, config: AdapterConfig) -> Selection:
    """The sites that `config` picks in `model`, matched on names of modules and parameters as PEFT matches them.

    Raises `SelectionError` when nothing matches (naming the nearest candidates), or when a module matches whose
    weight no reading covers. Warns of tied weights, and of names and numbers that match nothing.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    matches, besides = matcher(model, config), config.besides(input_embedding(model))
    tied = tied_to_embedding(model)
    _require_once(modules, matches, besides, tied)
    wanted = [name for name in modules if name and (matches(name) or is_named(besides, name))]
    led = {name: tied[0] for name in tied if config.ties and not is_named(besides, name)}
    _require_no_tie_excluded(config, [name for name in wanted if name in led], tied)
    matched = list(dict.fromkeys(led.get(name, name) for name in wanted))
    if missing := [each for each in besides if not any(is_named((each,), name) for name in modules)]:
        raise SelectionError(f"the config asks for {', '.join(missing)}, which the model does not have")
    unfit = {name: modules[name] for name in matched if not can_be_adapted(modules[name])}
    if unfit:
        raise SelectionError(unfit_message(unfit))
    parameters = named_parameters(model, config)
    if not matched and not parameters:
        raise SelectionError(nothing_message(modules, config) + _hint(experts_left(model, config)))
    _require_read_as_stored(modules, matched)
    selection = Selection(tuple(_sites(modules, matched, parameters)))
    for remark in _remarks(model, selection, modules, config):
        warn(remark)
    return selection


def whole_modules(model: nn.Module, config: AdapterConfig) -> tuple[str, ...]:
    """Paths of the modules that `config` picks, for kinds that train copies of these; the outermost of nested ones.

    Raises `SelectionError` when nothing matches, and warns of names that match nothing.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    matches = matcher(model, config)
    matched = [name for name in modules if name and matches(name)]
    if not matched:
        raise SelectionError(nothing_message(modules, config))
    for remark in _remarks(model, Selection(), modules, config):
        warn(remark)
    return tuple(name for name in matched if not any(name.startswith(f"{outer}.") for outer in matched))


def targets_of(model: nn.Module, config: AdapterConfig) -> str | tuple[str, ...]:
    """`target_modules`, or PEFT's default for the model or its architecture; `ConfigError` if there is none."""
    if config.target_modules is not None:
        return config.target_modules  # type: ignore[return-value]
    if config.for_embeddings and (embedding := input_embedding(model)):
        return (embedding,)
    model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
    if model_type not in config.default_targets and config.parameters:
        return ()
    if model_type not in config.default_targets:
        raise ConfigError(
            f"`target_modules` is None and no default is known for {model_type or type(model).__name__!r}; "
            f'name the modules, or use "all-linear" ({candidates(dict(model.named_modules()))})'
        )
    return config.default_targets[model_type]


def saved_modules(model: nn.Module, config: AdapterConfig) -> tuple[str, ...]:
    """Paths of the modules to train as a whole: those in `modules_to_save`, and the heads that PEFT adds for a task.

    As in PEFT a name is a plain ending here: "norm" also means "input_layernorm". Raises `SelectionError` for a name
    that matches nothing.
    """
    wanted = wanted_saved_names(config)
    found = [name for name, _ in model.named_modules() if name and name.endswith(wanted)]
    heads = TASK_HEADS.get(config.task_type or "", ())  # PEFT writes all of them, of which a model has one
    named = [ending for ending in config.modules_to_save or () if ending not in heads]
    missing = [ending for ending in named if not any(name.endswith(ending) for name in found)]
    if missing:
        raise SelectionError(f"`modules_to_save` names {missing}, which the model does not have")
    return tuple(name for name in found if not any(name.startswith(f"{outer}.") for outer in found))


def wanted_saved_names(config: AdapterConfig) -> tuple[str, ...]:
    """`modules_to_save`, with the heads that PEFT adds for the task."""
    return tuple(dict.fromkeys((*(config.modules_to_save or ()), *TASK_HEADS.get(config.task_type or "", ()))))


def matcher(model: nn.Module, config: AdapterConfig) -> Callable[[str], bool]:
    """Says of a name whether `target_modules` picks a module that is called so."""
    targets = targets_of(model, config)
    saved = wanted_saved_names(config)
    all_linear = _all_linear(model, config) if config.all_linear else None
    tied = tied_to_embedding(model) if config.ties and saved else ()
    twins = tied if any(is_saved(saved, name) for name in tied) else ()

    def matches(name: str) -> bool:
        if is_named(config.exclude_modules, name) or is_saved(saved, name) or name in twins:
            return False
        if all_linear is not None:
            return name in all_linear and _in_layers(config, name)
        exactly = not isinstance(targets, str) and name in targets  # a full name says its layer itself
        return exactly or (is_named(targets, name) and _in_layers(config, name))

    return matches


def _in_layers(config: AdapterConfig, name: str) -> bool:
    """Whether a module is in a wanted layer: the number is that after a pattern, or else the first in the name.

    PEFT looks from the name's second atom on: of a list at the model's root, as `layers.1.experts.0.up`, it finds no
    number, or the inner one.
    """
    layers = config.layers_to_transform
    if layers is None or layers == ():
        return True
    patterns = config.layers_pattern or ()
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    expressions = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r"(?:^|.*?\.)(\d+)\."]
    found = next((m for m in (re.match(expression, name) for expression in expressions) if m), None)
    return found is not None and int(found[1]) in ((layers,) if isinstance(layers, int) else layers)


def _all_linear(model: nn.Module, config: AdapterConfig) -> set[str]:
    """Every linear layer but the head: a causal LM's output embeddings, a classifier's scores."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    if head is None and config.task_type == "SEQ_CLS":
        head = next((h for name in CLASSIFIER_HEADS if (h := getattr(model, name, None)) is not None), None)
    return {
        path
        for path, module in model.named_modules(remove_duplicate=False)
        if module is not head and any(r in (LINEAR, CONV1D) and name != TOKEN for name, r, _ in weights_of(module))
    }


def _require_once(
    modules: dict[str, nn.Module], matches: Callable[[str], bool], besides: Sequence[str], tied: Sequence[str]
) -> None:
    """Raise `ConfigError` for a module that is to be adapted in two ways, be it by a tie."""
    named = [name for name in modules if name and is_named(besides, name)]
    for name in dict.fromkeys(other for each in named for other in (tied if each in tied else (each,))):
        if matches(name):
            raise ConfigError(
                f"{name} is in `target_modules` and in `trainable_token_indices`; leave it out of one of them"
            )


def _require_no_tie_excluded(config: AdapterConfig, wanted: Sequence[str], tied: Sequence[str]) -> None:
    """Raise `ConfigError` where some of tied modules are to be adapted, and others are excluded."""
    excluded = [name for name in tied if is_named(config.exclude_modules, name)]
    if wanted and excluded:
        raise ConfigError(
            f"`exclude_modules` leaves out {excluded[0]}, and with `ensure_weight_tying` the adapter of {wanted[0]} "
            "acts there, too; leave one of both out"
        )


def _sites(modules: dict[str, nn.Module], matched: list[str], parameters: list[Named]) -> Iterator[Site]:
    """One site a parameter, named after its first matched module; the other names of the parameter are `tied`."""
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for parameter, _, _ in weights_of(module):
            owners.setdefault(id(tensor_at(module, parameter)), []).append(name)
    seen: set[int] = set()
    for name, named in _with_children(modules, matched):
        module = modules[name]
        for parameter, reading, storage in weights_of(module):
            weight = tensor_at(module, parameter)
            if id(weight) not in seen:
                seen.add(id(weight))
                others = [other for other in owners[id(weight)] if modules[other] is not module]
                yield _site(name, module, parameter, reading, storage, tuple(others), named)
    for name, parameter, reading in parameters:
        module, path = modules[name], f"{name}.{parameter}"
        if id(weight := tensor_at(module, parameter)) in seen:
            raise SelectionError(f"{path} is in `target_parameters` and picked before: leave it out of one of them")
        seen.add(id(weight))
        others = [other for other in owners.get(id(weight), ()) if modules[other] is not module]
        yield _site(name, module, parameter, reading, DENSE, tuple(others), path)


def _with_children(modules: dict[str, nn.Module], matched: list[str]) -> Iterator[tuple[str, str]]:
    """The matched modules and the children that their readings adapt `along`, each with the module that was matched."""
    for name in matched:
        yield name, name
        along = [child for _, reading, _ in weights_of(modules[name]) for child in reading.along]
        yield from ((f"{name}.{child}", name) for child in along)


def _require_read_as_stored(modules: dict[str, nn.Module], matched: list[str]) -> None:
    """Raise `SelectionError` for a quantised layer within a module that reads the layer's weight by itself."""
    for name, _ in _with_children(modules, matched):
        parent, _, child = name.rpartition(".")
        reads_it = any(child in reading.along for _, reading, _ in weights_of(modules[parent]))
        if reads_it and any(storage.whole for _, _, storage in weights_of(modules[name])):
            raise SelectionError(
                f"{name} is quantised, and {type(modules[parent]).__name__} computes with its weight as it is stored: "
                "the model does not run. Leave it out of quantisation (`llm_int8_skip_modules`)"
            )


def _site(
    name: str,
    module: nn.Module,
    parameter: str,
    reading: Reading,
    storage: Storage,
    tied: tuple[str, ...],
    named: str,
) -> Site:
    if isinstance(tensor_at(module, parameter), nn.parameter.UninitializedParameter):
        raise SelectionError(f"{name} is a lazy module that has not run yet; call the model once before compiling")
    storage = storage.of(module, name)
    shape, groups = storage.shape(module, parameter), getattr(module, "groups", 1)
    if 0 in shape:
        raise SelectionError(
            f"the weight of {name} has no numbers, its shape is {tuple(shape)}: add it to `exclude_modules`, or adapt "
            "the model before parameters are shared out among processes"
        )
    inputs, outputs = reading.features(shape, groups)
    return Site(
        module=name,
        parameter=parameter,
        reading=reading,
        storage=storage,
        in_features=inputs,
        out_features=outputs,
        weight_shape=shape,
        groups=groups,
        has_bias=isinstance(getattr(module, reading.bias, None), nn.Parameter),
        tied=tied,
        named=named,
    )


def _remarks(
    model: nn.Module, selection: Selection, modules: dict[str, nn.Module], config: AdapterConfig
) -> Iterator[str]:
    """What to say once about a selection: weights that are tied, or will not be, and names that pick nothing."""
    for site in selection:
        if site.tied and not config.ties:
            yield (
                f"{site.name} shares its weight with {', '.join(site.tied)}: they are one site, and its adapter acts "
                "wherever the weight is read (PEFT adapts only the named module until it merges)"
            )
    if placed := _in_other_places(selection, modules):
        yield f"{placed} are one module: its adapter acts wherever the module is called (PEFT adapts the first alone)"
    saved = saved_modules(model, config)
    if config.ties and (remark := _remark_of_tying(model, selection, saved)):
        yield remark
    for untied, others in _untied(modules, saved) if not config.ties else ():
        yield (
            f"`modules_to_save` trains {untied} by itself, which the model ties to {', '.join(others)}: on this model "
            "they are tied no longer"
            + (" (`ensure_weight_tying` keeps them so)" if hasattr(config, "ensure_weight_tying") else "")
        )
    if config.all_linear and (computed := [name for name, module in modules.items() if is_computed(module)]):
        yield f'"all-linear" leaves out {", ".join(computed[:5])}: {COMPUTED}'
    experts, stacked = experts_left(model, config), _names_of_stacks(model, config)
    if experts and config.all_linear:
        yield f'"all-linear" leaves out the stacked weights of experts, which {experts} would adapt, too'
    for name in ("target_modules", "exclude_modules"):
        # PEFT leaves a parameter's name among the targets that it makes of a regex.
        besides = [each.weight for each in selection if each.is_parameter] if name == "target_modules" else stacked
        if idle := _idle(name, [*modules, *besides], config):
            hint = _hint(experts) if name == "target_modules" else ""
            yield f"`{name}` entries that match no module: {idle} ({nearest(idle, modules)}).{hint}"
    if idle_layers := _idle_layers(model, modules, config):
        yield f"`layers_to_transform` numbers that pick no module: {idle_layers}"


def _names_of_stacks(model: nn.Module, config: AdapterConfig) -> list[str]:
    """What a config could exclude of experts: the parameters that stack them, and the layers that they were."""
    found = stacks(model) if config.exclude_modules and config.takes_parameters else ()
    return [name for stack in found for name in (stack.path, *stack.names)]


def _hint(experts: str) -> str:
    return f" The weights of experts are stacked here: {experts} adapts them." if experts else ""


def _in_other_places(selection: Selection, modules: dict[str, nn.Module]) -> str:
    """The names of the first adapted module that is called by several, be it in one parent or in many; or nothing."""
    places: dict[int, dict[tuple[int, str], str]] = {}
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        places.setdefault(id(module), {}).setdefault((id(modules[parent]), name), path)
    several = (found for site in selection if len(found := places[id(modules[site.module])]) > 1)
    return " and ".join(next(several, {}).values())


def _remark_of_tying(model: nn.Module, selection: Selection, saved: Sequence[str]) -> str:
    """What to say of `ensure_weight_tying` where it has no effect; empty if it has."""
    tied = tied_to_embedding(model)
    if not tied:
        return "`ensure_weight_tying` has no effect: no other module has the input embedding's weight"
    touched = {site.module for site in selection if site.tied}.union(name for name in tied if _is_within(saved, name))
    idle = f"`ensure_weight_tying` has no effect: none of {', '.join(tied)}, which are tied, is adapted or saved"
    return "" if touched.intersection(tied) else idle


def _is_within(outer: Sequence[str], name: str) -> bool:
    return any(name == each or name.startswith(f"{each}.") for each in outer)


def _idle(field: str, names: Sequence[str], config: AdapterConfig) -> list[str]:
    """Entries of `target_modules` or `exclude_modules` that are none of these names, and none of their endings."""
    value = getattr(config, field)
    entries = [] if value is None or (config.all_linear and field == "target_modules") else value
    if isinstance(entries, str):
        return [] if any(is_named(entries, name) for name in names) else [entries]
    whole = {*names}
    endings = [entry for entry in entries if entry not in whole]  # a file has hundreds of whole names
    return [entry for entry in endings if not any(is_named((entry,), name) for name in names)]


def _idle_layers(model: nn.Module, modules: dict[str, nn.Module], config: AdapterConfig) -> list[int]:
    layers = config.layers_to_transform
    numbers = (layers,) if isinstance(layers, int) else layers or ()
    alone = [(number, matcher(model, config.replace(layers_to_transform=(number,)))) for number in numbers]
    return [number for number, matches in alone if not any(matches(name) for name in modules)]


def _untied(modules: dict[str, nn.Module], saved: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each parameter of modules to save that other modules have, too, with the names that it has there."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in modules.items():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((f"{path}.{name}", module))
    for owned in owners.values():
        inside = [(n, m) for n, m in owned if any(n.startswith(f"{outer}.") for outer in saved)]
        others = [name for name, module in owned if inside and module is not inside[0][1]]
        if others:
            yield inside[0][0], others
