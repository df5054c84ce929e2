"""What a kind is: an adapter family's equation, its tensors, their start values, and the weight that it amounts to.

An equation wraps the base operator, which stays where it is:

    y = after(operator(before(x)), x)

`before` and `after` are plain functions over `torch.ops.aten`. They are run on the nodes of a graph, whose operators
they become. What else they need is in their last argument, `Operands`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..config import AdapterConfig
from ..readings import Operator
from ..site import Site

aten = torch.ops.aten
SCALING = "scaling"  # the number that multiplies an update; it may be a tensor, so that it can change


class Spec(NamedTuple):
    """A tensor of an adapter at a site: what PEFT's files call it, after the module's path, and its shape."""

    suffix: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Operands:
    """What an equation has at hand besides x and y, at one site.

    Tensors and numbers of the adapter are attributes by the names that the kind gives them (`at.lora_A`, `at.scaling`).
    `operator` is the one that reads the weight there, `bound` what its further arguments are, `training` whether the
    site's module is in training mode. `weight` is the dense weight, for a kind that `reads_weight`.
    """

    site: Site
    config: Any
    tensors: Mapping[str, Any]
    numbers: Mapping[str, Any] = field(default_factory=dict)
    operator: Operator | None = None
    bound: Mapping[str, Any] = field(default_factory=dict)
    training: bool = False
    weight: Any = None

    def __getattr__(self, name: str) -> Any:
        for known in (self.tensors, self.numbers):
            if name in known:
                return known[name]
        raise AttributeError(f"there is no {name!r} at {self.site.name}: {[*self.tensors, *self.numbers]}")

    def narrow(self, x: Any, a: Any) -> Any:
        """What the operator gives with the narrow weight A in place of its own: r features of x."""
        assert self.operator is not None
        return self.operator.narrow(x, a, **self.operator.given(self.operator.narrow, dict(self.bound)))

    def wide(self, h: Any, b: Any, bias: Any = None) -> Any:
        """What comes of the narrow operator's result by the wide weight B, and a bias if there is one."""
        assert self.operator is not None
        given = self.operator.given(self.operator.wide, {**self.bound, "update_bias": bias})
        return self.operator.wide(h, b, **given)

    def dropout(self, x: Any, p: float) -> Any:
        """x with a share p of its numbers zero in training, the others larger; row numbers are left alone."""
        assert self.operator is not None
        return x if self.operator.lookup else aten.dropout.default(x, p, self.training)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """B A, of the shape of the weight."""
        return self.site.reading.product(a, b, self.site.weight_shape)


class Kind:
    """An adapter family. A subclass is one file; `lorafx.adapters.kinds.register` makes it known.

    `config` is its config class, which also says its PEFT type. `additive` says that what it amounts to is a change of
    the weight that does not depend on the weight: then `delta` is all that merging needs, and the order in which such
    adapters are merged makes no difference. `reads_weight` says that its equation or its start values need the weight.
    """

    config: ClassVar[type[AdapterConfig]]
    additive: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = False

    # --- what there is -----------------------------------------------------------------------------------------------

    def check(self, site: Site, config: Any) -> None:
        """Raise `ConfigError` if the config cannot be served at this site."""

    def tensors(self, site: Site, config: Any) -> dict[str, Spec]:
        """The adapter's tensors at a site, by the names that its equation gives them."""
        raise NotImplementedError

    def numbers(self, site: Site, config: Any) -> dict[str, float]:
        """The numbers of its equation; one called "scaling" can be changed while the adapter runs."""
        return {}

    def init(
        self, site: Site, config: Any, tensors: Mapping[str, Tensor], rng: torch.Generator | None, weight: Tensor | None
    ) -> None:
        """Fill the tensors of a site with their start values, in place.

        `weight` is the dense base weight, for a kind that `reads_weight`.
        """
        raise NotImplementedError

    # --- what it computes --------------------------------------------------------------------------------------------

    def before(self, x: Any, at: Operands) -> Any:
        """What the base operator is given instead of x."""
        return x

    def after(self, y: Any, x: Any, at: Operands) -> Any:
        """What takes the place of the operator's result y; x is what the layer was given."""
        return y

    def transposed(self, tensors: Mapping[str, Any]) -> dict[str, Any] | None:
        """The tensors of the same adapter for the transposed weight, as a tied weight may be read; None if there are
        none.
        """
        return None

    # --- the weight that it amounts to -------------------------------------------------------------------------------

    def changes(self, site: Site, config: Any) -> tuple[str, ...]:
        """Which of a site's base parameters it amounts to a change of, "weight" and "bias".

        Raises `MergeError` for a site where it is no change of the weight at all, so that it cannot be merged.
        """
        return ("weight",)

    def delta(self, name: str, at: Operands) -> Tensor:
        """What an additive kind adds to a base parameter, "weight" or "bias"."""
        raise NotImplementedError

    def merged(self, name: str, base: Tensor, at: Operands) -> Tensor:
        """A base parameter, "weight" (dense) or "bias", with the adapter in it; all tensors are of one wide dtype."""
        return base + self.delta(name, at)

    def unmerged(self, name: str, merged: Tensor, at: Operands) -> Tensor | None:
        """The inverse of `merged`, but for rounding; None where there is none, so that a copy is kept instead."""
        return merged - self.delta(name, at) if self.additive else None
