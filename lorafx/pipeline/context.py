"""The context: what a pass may need besides the graph."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from torch import nn

from ..adapters.adapter import Adapter
from ..adapters.site import Selection, Site


@dataclass(frozen=True)
class Context:
    """What a pass may need besides the graph.

    `adapters` are those that act, innermost first; `merged` names those of them that are merged into the base weights;
    `trained` are the paths of base parameters that the user trains along with them. Where each row of a call chooses
    its own adapter, `numbers` are those that rows choose the adapters by; else there are none.
    """

    adapters: tuple[Adapter, ...] = ()
    merged: frozenset[str] = frozenset()
    trained: frozenset[str] = frozenset()
    numbers: tuple[int, ...] = ()

    @property
    def selection(self) -> Selection:
        """The sites of all adapters."""
        selection = Selection()
        for adapter in self.adapters:
            selection |= adapter.selection
        return selection

    def relative_to(self, path: str) -> Context | None:
        """The context of a graph over the module at `path`; None if `Adapter.relative_to` is None for one of them."""
        adapters = [adapter.relative_to(path) for adapter in self.adapters]
        if None in adapters:
            return None
        here = [a is not None and bool(a.selection or a.replaced) for a in adapters]
        acting = tuple(a for a, acts in zip(adapters, here) if a is not None and acts)
        numbers = tuple(number for number, acts in zip(self.numbers, here) if acts)
        trained = frozenset(p.removeprefix(f"{path}.") for p in self.trained if p.startswith(f"{path}."))
        return Context(acting, self.merged & {a.name for a in acting}, trained, numbers)

    def signature(self, root: nn.Module) -> Hashable:
        """A key that is equal for contexts in which passes rewrite equal graphs in the same way."""
        return tuple(adapter.signature(root) for adapter in self.adapters), self.merged, self.numbers

    def sites_by_weight(self, root: nn.Module) -> dict[int, Site]:
        """The sites of all adapters by the identity of the parameter they adapt."""
        return {weight: site for adapter in self.adapters for weight, site in adapter.sites_by_weight(root).items()}
