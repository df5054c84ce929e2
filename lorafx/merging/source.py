"""Sources: what an adapter was at a site when it was merged, so that it can be taken out again."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.kinds import Operands
from ..adapters.low_rank import LowRank
from ..adapters.site import Site


@dataclass(frozen=True)
class Source:
    """One adapter's part in a merged weight: copies of its tensors there, but for fixed ones, and its numbers.

    Whatever becomes of the adapter, the weight is restored from these.
    """

    adapter: Adapter
    site: Site
    numbers: Mapping[str, float]
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, root: nn.Module, adapter: Adapter, site: Site) -> Source:
        """Record what `adapter` holds for `site` now."""
        fixed = {spec.suffix for spec in adapter.specs(site).values() if spec.fixed}
        tensors = {suffix: tensor.detach() for suffix, tensor in adapter.tensors_at(root, site).items()}
        copies = {suffix: tensor if suffix in fixed else tensor.clone() for suffix, tensor in tensors.items()}
        return cls(adapter, site, adapter.numbers(root, site), copies)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        fixed = {spec.suffix for spec in self.adapter.specs(self.site).values() if spec.fixed}
        return sum(tensor.nbytes for suffix, tensor in self.tensors.items() if suffix not in fixed)

    def delta(self, role: str, like: Tensor) -> LowRank | Tensor:
        """What an additive kind adds to a base parameter, "weight" or "bias"; computed where and as `like` is."""
        return self.adapter.kind.delta(role, self._operands(like))

    def merged(self, role: str, base: Tensor) -> Tensor:
        """A base parameter with the adapter in it."""
        return self.adapter.kind.merged(role, base, self._operands(base))

    def unmerged(self, role: str, merged: Tensor) -> Tensor | None:
        """The inverse of `merged`, up to rounding; None if the kind has none."""
        return self.adapter.kind.unmerged(role, merged, self._operands(merged))

    def _operands(self, like: Tensor) -> Operands:
        tensors = {
            name: tensor.to(like.device, like.dtype if tensor.is_floating_point() else None)
            for name, tensor in ((name, self.tensors[suffix]) for name, suffix in self._suffixes.items())
        }
        return Operands(self.site, self.adapter.config, tensors, self.numbers)

    @functools.cached_property
    def _suffixes(self) -> dict[str, str]:
        """What files call the tensors, by the kind's names for them."""
        return {name: spec.suffix for name, spec in self.adapter.specs(self.site).items()}
