"""Settings: the named values of a module tree that only its Python reads, which a graph has as constants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from ..torch_private.tensors import ENTRANCE
from .attached import ATTACHED
from .holdings import CONTAINERS, PLAIN, holdings, is_library, is_looked_into, own_names
from .mirror import STATE

# Attributes of every module that hold no settings: parameters, buffers, modules, hooks, and what lorafx puts there.
MODULES_OWN = frozenset(vars(nn.Module())) - {"training"} | {STATE, ATTACHED, ENTRANCE}
_PLAIN = frozenset(PLAIN)  # what most attributes are: told apart by class alone, which takes less time
_NO_OBJECTS = (nn.Module, type, FunctionType, MethodType, *CONTAINERS)


def settings_of(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, Any, list[str]]]:
    """Where settings are found, each place once: what to call it, the object, and the names of attributes that count.

    Places are the modules, the objects (configs, say) that they have as attributes, and these in turn; and the modules'
    classes, whose attributes and functions may change as well.
    """
    seen: set[int] = set()
    names_of_classes: Counter[str] = Counter()
    pending: list[tuple[str, Any]] = list(modules)
    while pending:
        path, holder = pending.pop()
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        if isinstance(holder, type):  # of one name there may be several
            names_of_classes[path] += 1
            path += "'" * (names_of_classes[path] - 1)
        attributes = vars(holder)
        names = _names_of_class(holder) if isinstance(holder, type) else _names_of(holder)
        yield path, holder, names
        values = ((name, attributes[name]) for name in names)  # all layers may have one config: it is found once
        pending += [(f"{path}.{name}", value) for name, value in values if id(value) not in seen and _is_object(value)]
        if isinstance(holder, nn.Module):
            pending += [(f"class {k.__name__}", k) for k in type(holder).__mro__ if _may_change(k)]


def _may_change(kind: type) -> bool:
    """Whether a class is somebody's own, or a library's for modules, which others patch.

    lorafx itself puts functions in the place of some of torch's.
    """
    patched = "forward" in vars(kind) and not kind.__module__.startswith(("torch.", "lorafx."))
    return patched or not is_library(kind.__module__)


def _names_of_class(kind: type) -> list[str]:
    return ["forward"] if is_library(kind.__module__) else own_names(kind)


def _names_of(holder: Any) -> list[str]:
    names: list[str] = list(vars(holder))
    return [name for name in names if name not in MODULES_OWN] if isinstance(holder, nn.Module) else names


def _is_object(value: Any) -> bool:
    """Whether a value is an object with attributes, as a config is."""
    if type(value) in _PLAIN or isinstance(value, _NO_OBJECTS):
        return False
    return hasattr(value, "__dict__") and is_looked_into(value) and len(holdings(value)) == 1
