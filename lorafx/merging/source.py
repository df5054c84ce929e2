"""Sources: what an adapter was at a site when it was merged, so that it can be taken out again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.kinds import Operands
from ..adapters.low_rank import LowRank
from ..adapters.site import Site


@dataclass(frozen=True)
class Source:
    """One adapter's part in a merged weight: copies of its tensors there, and its numbers.

    Whatever becomes of the adapter, the weight is restored from these.
    """

    adapter: Adapter
    site: Site
    numbers: Mapping[str, float]
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, root: nn.Module, adapter: Adapter, site: Site) -> Source:
        """Record what `adapter` holds for `site` now."""
        tensors = {suffix: tensor.detach().clone() for suffix, tensor in adapter.tensors_at(root, site).items()}
        return cls(adapter, site, adapter.numbers(root, site), tensors)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

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
        tensors = {suffix: tensor.to(like.device, like.dtype) for suffix, tensor in self.tensors.items()}
        return self.adapter.operands(self.site, tensors, self.numbers)
