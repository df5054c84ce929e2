"""Adapted tensors: which tensors the adapters act on while a model's own Python runs, known by their identity.

They are adapted weights, and base tensors of which adapters have a copy of their own. A module may hold others than
before by the time it runs, as where parameters are sharded or offloaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from ..adapters.tying import parted
from ..capture.frames import running_line
from ..errors import AdapterError, UncoveredOperatorError
from ..torch_private.tensors import is_within_transform
from ..tree.lookup import module_at
from ..tree.memory import storage_of, whole_storage_of
from ..tree.originals import other_mode
from ..tree.watched import can_be_watched
from .methods import is_getter, takes_numbers
from .site_table import Place, SiteTable


class AdaptedTensors:
    """The tensors that a table says adapters act on, as they are in a tree now: `weights` and `replaced`, paths by id.

    `looks_at_memory` has other tensors refused that are part of an adapted weight.
    """

    def __init__(self, tree: nn.Module, table: SiteTable, looks_at_memory: bool):
        self.tree, self.table, self.looks_at_memory = tree, table, looks_at_memory
        # Kept alive: where a hook puts others in their place, those that come later must not get their ids.
        self.every = [place.tensor for place in (*table.weights, *table.replaced)]
        self.weights = {id(place.tensor): place.path for place in table.weights}
        self.replaced = {id(place.tensor): place.path for place in table.replaced}

    @property
    def are_tied(self) -> bool:
        """Whether adapters know a weight by several names."""
        return len(set(map(id, self.every[: len(self.table.weights)]))) < len(self.table.weights)

    @property
    def can_be_watched(self) -> bool:
        """Whether these tensors' own class can tell of the functions that are given one."""
        return not self.table.hidden and not is_within_transform() and can_be_watched(self.every)

    def come_with(self, part: str) -> list[tuple[dict[int, str], int]]:
        """Know the tensors, too, that a module has while it runs; the result is those that were not known, to forget.

        Once it has run they are gone, and another tensor may have their ids.
        """
        new = []
        for known, places in zip((self.weights, self.replaced), self.table.owned[part]):
            for place in places:
                if (number := id(place.tensor)) not in known:
                    known[number] = place.path
                    new.append((known, number))
        return new

    def forget(self, new: Iterable[tuple[dict[int, str], int]]) -> None:
        """Know those no longer that came with a module."""
        for known, number in new:
            del known[number]

    def acts_on(self, values: Iterable[Any], func: Callable[..., Any] | None = None) -> bool:
        """Whether an adapted tensor, or one that an adapter has a copy of, is among a function's arguments.

        Raises `UncoveredOperatorError` for a tensor that is part of an adapted weight, made of it before the call;
        to read its shape is no harm.
        """
        weights, replaced, memory = self.weights, self.replaced, self.memory
        for value in values:
            number, kind = id(value), type(value)
            if number in weights or number in replaced:
                return True
            if (kind is tuple or kind is list) and self.acts_on(value, func):
                return True
            if memory and kind is Tensor and (place := memory.get(storage_of(value))) and not is_getter(func):
                if storage_of(place.tensor) != storage_of(value):  # a hook has given the weight other memory since
                    continue
                raise UncoveredOperatorError(
                    f"the weight {place.path} is read by a tensor that shares its memory, which no adapter acts on"
                    f"{running_line()}"
                )
        return False

    @functools.cached_property
    def memory(self) -> dict[int, Place]:
        """The weights' places by where their memory begins; none where nobody looks at it."""
        if not self.looks_at_memory:
            return {}
        changed = [place for place in self.table.weights if self.table.around(place.path)]  # others are what they are
        return {storage: place for place in changed if (storage := whole_storage_of(place.tensor))}

    def copy_of(self, value: Any) -> Any:
        """The adapters' own copy of a base tensor that they replace, in its dtype; any other value itself."""
        path = self.replaced.get(id(value))
        if path is None:
            return value
        copy = self.table.copies[path].tensor
        return copy if copy.dtype == value.dtype else copy.to(value.dtype)

    @functools.cached_property
    def copies_differ(self) -> bool:
        """Whether a base tensor that an adapter has a copy of is in several modules, and not all read one copy."""
        copies = {base: copy.path for base, copy in self.table.copies.items()}
        return bool(copies and parted(self.tree, copies))

    def paths(self, leaves: Iterable[Any], part: str) -> list[str | None]:
        """Where in the tree the tensors among some leaves are: adapted ones, and those of the module that runs."""
        module = module_at(self.tree, part)
        tensors = (*module._parameters.items(), *module._buffers.items())
        own = {id(tensor): f"{part}.{name}".lstrip(".") for name, tensor in tensors if tensor is not None}
        return [own.get(id(x)) or self.weights.get(id(x)) or self.replaced.get(id(x)) for x in leaves]

    def require_no_values(self, func: Callable[..., Any], tensor: Tensor) -> None:
        """Raise `UncoveredOperatorError` if a method takes the numbers of an adapted weight out of torch."""
        if takes_numbers(func) and id(tensor) in self.weights:
            read = f"the weight {self.weights[id(tensor)]} is read by `{func.__name__}`, where no adapter can act"
            raise UncoveredOperatorError(read + running_line())

    def require_one_mode(self, leaves: Iterable[Any], part: str) -> None:
        """Raise `AdapterError` if the base's own module reads a weight, in another mode than the adapted model's."""
        for leaf in leaves:
            owner = self.weights.get(id(leaf), part + ".").rpartition(".")[0]
            if owner != part and (reason := other_mode(leaf, self.tree.get_submodule(owner))):
                raise AdapterError(reason)
