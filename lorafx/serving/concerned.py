"""Concerned: the adapters that act on the tensors of one torch function, which is to be a graph of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from torch import nn

from ..adapters.adapter import Adapter
from ..adapters.tying import parted
from ..pipeline import Context
from ..tree.lookup import tensor_at


class Concerned(NamedTuple):
    """The adapters of `context` at a function that the module at `part` calls with tensors of these ids."""

    tree: nn.Module
    context: Context
    part: str
    tensors: Collection[int]

    @classmethod
    def by(cls, leaves: Iterable[Any], tree: nn.Module, context: Context, part: str) -> Concerned:
        """What the leaves of a function's arguments concern."""
        return cls(tree, context, part, set(map(id, leaves)))

    def restricted(self) -> Context:
        """The context with the adapters as far as they act here."""
        replaced = {base for adapter in self.context.adapters for base in adapter.replaced if self._replaces(base)}
        every = tuple(each.restricted_to(self._names(each), replaced) for each in self.context.adapters)
        adapters = tuple(each for each in every if each.selection or each.replaced)
        return Context(adapters, self.context.merged & {each.name for each in adapters})

    def hooked(self, hooked: Iterable[str]) -> tuple[str, ...]:
        """Of the modules of adapters' tensors that somebody hooks those whose tensors act here."""
        paths = {
            path.rpartition(".")[0]
            for adapter in self.context.adapters
            for site in adapter.selection
            if id(tensor_at(self.tree, site.weight)) in self.tensors
            for path in adapter.tensors[site.name].values()
        }
        return tuple(path for path in hooked if path in paths)

    def _names(self, adapter: Adapter) -> list[str]:
        """What an adapter calls the weights among the tensors: two may know a tied one by different names."""
        return [site.weight for site in adapter.selection if id(tensor_at(self.tree, site.weight)) in self.tensors]

    def _replaces(self, base: str) -> bool:
        """Whether the copy of a base tensor acts here: a tied tensor is replaced in the module that owns the name."""
        tensor = id(tensor_at(self.tree, base))
        return tensor in self.tensors and (tensor not in self._parted() or self.part == base.rpartition(".")[0])

    def _parted(self) -> set[int]:
        return parted(self.tree, {b: copy for each in self.context.adapters for b, copy in each.replaced.items()})
