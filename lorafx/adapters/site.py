"""A site, one place where an adapter can attach, and a selection of them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..tables import InNotebooks, table
from .readings import Reading
from .storages import Storage


@dataclass(frozen=True)
class Site:
    """One weight that an adapter can attach to.

    `module` is the path of the module that owns it and `parameter` what the module calls it; `reading` says by which
    operators a graph reads it, `storage` how it is kept. `weight_shape` is that of the dense weight, `groups` those of
    a convolution. `named` is the path that `rank_pattern` and the like are matched with: that of the module the config
    picked, which may be the parent. `tied` lists the other modules that have the parameter: one parameter is one site,
    and its adapter acts wherever the parameter is read.
    """

    module: str
    parameter: str
    reading: Reading
    storage: Storage
    in_features: int
    out_features: int
    weight_shape: tuple[int, ...]
    groups: int = 1
    has_bias: bool = False
    tied: tuple[str, ...] = ()
    named: str = ""

    @property
    def name(self) -> str:
        """The module's path; with the parameter's name added if that is not the reading's usual one."""
        return self.module if self.storage.whole or self.parameter == self.reading.weight else self.weight

    @property
    def is_parameter(self) -> bool:
        """Whether a config named the parameter itself, and not its module."""
        return self.named == self.weight

    @property
    def weight(self) -> str:
        """Path of the base weight."""
        return f"{self.module}.{self.parameter}"

    @property
    def bias(self) -> str:
        """Path of the base bias, whether or not there is one."""
        return f"{self.module}.{self.reading.bias}"


@dataclass(frozen=True)
class Selection(Sequence[Site], InNotebooks):
    """The sites that a config picks, in the order of the module tree. Prints as a table."""

    sites: tuple[Site, ...] = ()
    by_name: dict[str, Site] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", {site.name: site for site in self.sites})

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return Selection(self.sites[index]) if isinstance(index, slice) else self.sites[index]

    def __contains__(self, site: object) -> bool:
        return site in self.by_name or site in self.sites

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    @functools.cached_property
    def wrappers(self) -> Counter[str]:
        """In how many layers PEFT wraps each module: one for the module itself, one for each parameter of it."""
        modules = {site.module for site in self.sites if not site.is_parameter}
        return Counter(modules) + Counter(site.module for site in self.sites if site.is_parameter)

    @functools.cached_property
    def parameters(self) -> dict[str, list[Site]]:
        """The sites that are parameters which a config named, in order, by their module."""
        found: dict[str, list[Site]] = {}
        for site in self.sites:
            if site.is_parameter:
                found.setdefault(site.module, []).append(site)
        return found

    def __or__(self, other: Selection) -> Selection:
        """The sites of both, each once."""
        return Selection(self.sites + tuple(site for site in other if site.name not in self.by_name))

    def __str__(self) -> str:
        rows = [
            (site.name, site.reading.name, site.in_features, site.out_features, ", ".join(site.tied))
            for site in self.sites
        ]
        return table(f"{len(self)} sites", ("site", "reading", "in", "out", "tied to"), rows)
