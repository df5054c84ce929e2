"""Mismatches: what to say where names match no module, or one that no adapter can act on."""

from __future__ import annotations

import difflib
from collections import Counter

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .config import AdapterConfig
from .readings import READINGS
from .storages import weights_of


def can_be_adapted(module: nn.Module) -> bool:
    """Whether it has a weight that some reading covers."""
    return any(True for _ in weights_of(module))


COMPUTED = (
    "the weight is computed from other tensors in each call, by a parametrization, weight norm or pruning; bake that "
    "in first (`torch.nn.utils.parametrize.remove_parametrizations`, `torch.nn.utils.prune.remove` …)"
)


def is_computed(module: nn.Module) -> bool:
    """Whether a linear layer has something else than a parameter for a weight, which a hook or a property computes."""
    return isinstance(module, nn.Linear) and ("weight" in vars(module) or is_parametrized(module, "weight"))


def unfit_message(unfit: dict[str, nn.Module]) -> str:
    """Of modules that are matched and cannot be adapted, by name."""
    shown = ", ".join(f"{name} ({type(module).__name__})" for name, module in list(unfit.items())[:5])
    more = f" and {len(unfit) - 5} more" if len(unfit) > 5 else ""
    supported = ", ".join(cls.__name__ for reading in READINGS for cls in reading.modules)
    if all(map(is_computed, unfit.values())):
        return f"`target_modules` matches {shown}{more}, where {COMPUTED}"
    return (
        f"`target_modules` matches modules whose weight no reading covers: {shown}{more}. "
        f"Covered: {supported}. Narrow `target_modules` or add these to `exclude_modules`."
    )


def nothing_message(modules: dict[str, nn.Module], config: AdapterConfig) -> str:
    """Of targets that match none of these modules."""
    if (root := modules.get("")) is not None and can_be_adapted(root):
        return f"the model is itself a {type(root).__name__}, without a name: nn.Sequential(…) around it gives it one"
    targets = config.target_modules
    wanted, regex = [] if config.all_linear else list(targets or ()), ""
    if isinstance(targets, str) and not config.all_linear:
        if difflib.get_close_matches(targets.lower(), ["all-linear"], cutoff=0.7):
            return f'no module matches target_modules={targets!r}. Did you mean "all-linear"?'
        wanted, regex = [targets], " (a string is a regex for the whole name; a list holds suffixes)"
    narrowed = " within the layers and exclusions given" if config.layers_to_transform or config.exclude_modules else ""
    return f"no module matches target_modules={targets!r}{regex}{narrowed}. {nearest(wanted, modules)}"


def nearest(wanted: list[str], modules: dict[str, nn.Module]) -> str:
    """Which modules that can be adapted have names that are like these, and which there are."""
    suffixes = {name.rpartition(".")[2]: type(m).__name__ for name, m in modules.items() if name and can_be_adapted(m)}
    close = [c for w in wanted for c in difflib.get_close_matches(w.rpartition(".")[2], suffixes, n=3, cutoff=0.5)]
    near = ", ".join(f"{name} ({suffixes[name]})" for name in dict.fromkeys(close))
    return (f"Nearest: {near}. " if near else "") + candidates(modules)


def candidates(modules: dict[str, nn.Module]) -> str:
    """Which modules can be adapted, by the last part of their names."""
    counts = Counter(
        f"{name.rpartition('.')[2]} ({type(module).__name__})"
        for name, module in modules.items()
        if name and can_be_adapted(module)
    )
    shown = ", ".join(f"{name} x{count}" for name, count in counts.most_common(12))
    return f"Modules that can be adapted: {shown or 'none'}"
