"""What an adapter family must say about itself; passes and model know kinds only through this."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config import LoraConfig
from ..selection import Site


class Kind(Protocol):
    """An adapter family: one equation, its tensors, their start values, and the weight change they amount to."""

    peft_type: str

    def check(self, site: Site, config: LoraConfig) -> None:
        """Raise `ConfigError` if the config cannot be served at this site."""
        ...

    def rank(self, site: Site, config: LoraConfig) -> int:
        """The rank of a site's update."""
        ...

    def scaling(self, site: Site, config: LoraConfig) -> float:
        """What a site's update is multiplied by."""
        ...

    def shapes(self, site: Site, config: LoraConfig) -> dict[str, tuple[int, ...]]:
        """Shape of each adapter tensor of a site, by the suffix that PEFT's files give it."""
        ...

    def init(self, site: Site, config: LoraConfig, tensors: Mapping[str, Tensor], rng: torch.Generator | None) -> None:
        """Fill the tensors of a site with their start values, in place."""
        ...

    def equation(self, site: Site, pattern: Callable[..., Any]) -> Callable[..., Any]:
        """The function that replaces `pattern`, the form in which a graph reads the site's weight."""
        ...

    def scalars(self, site: Site, config: LoraConfig) -> dict[str, Any]:
        """The numbers that the equation names."""
        ...

    def names(self, site: Site, config: LoraConfig) -> dict[str, str | None]:
        """Which tensor (by suffix) each name of the equation stands for; None for one the config leaves out."""
        ...

    def delta(self, site: Site, config: LoraConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The change the adapter makes to the site's base parameters, "weight" and "bias", in float64.

        Raises `MergeError` for a site whose equation is no change of the base weight.
        """
        ...
