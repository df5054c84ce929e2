"""Sources: what an adapter was at a site when it was merged, so that it can be taken out again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.kinds import Operands
from ..adapters.site import Site
from ..errors import MergeError
from ..tree.lookup import tensor_at
from .residual import fingerprint

# Adapter tensors are copied if they are at most this share of the weight: then unmerging works after they changed.
_SMALL = 1 / 16


@dataclass(frozen=True)
class Source:
    """One adapter's part in a merged weight: the values it had then, as copies if small, else as fingerprints."""

    adapter: Adapter
    site: Site
    numbers: Mapping[str, float]
    prints: dict[str, int]
    copies: dict[str, Tensor] | None

    @classmethod
    def of(cls, root: nn.Module, adapter: Adapter, site: Site) -> Source:
        """Record what `adapter` holds for `site` now."""
        tensors = {suffix: tensor.detach() for suffix, tensor in adapter.tensors_at(root, site).items()}
        small = sum(map(bytes_of, tensors.values())) <= _SMALL * bytes_of(tensor_at(root, site.weight))
        prints = {suffix: fingerprint(tensor) for suffix, tensor in tensors.items() if not tensor.is_meta}
        copies = {suffix: tensor.clone() for suffix, tensor in tensors.items()} if small else None
        return cls(adapter, site, adapter.numbers(root, site), prints, copies)

    @property
    def nbytes(self) -> int:
        """Bytes held in copies."""
        return sum(map(bytes_of, (self.copies or {}).values()))

    def values(self, root: nn.Module) -> dict[str, Tensor]:
        """The adapter's tensors as they were at the merge; `MergeError` if they are gone."""
        if self.copies is not None:
            return self.copies
        tensors = {suffix: t.detach() for suffix, t in self.adapter.tensors_at(root, self.site).items()}
        changed = [suffix for suffix, tensor in tensors.items() if fingerprint(tensor) != self.prints.get(suffix)]
        if changed:
            raise MergeError(
                f"adapter {self.adapter.name!r} has changed since it was merged ({self.site.name}: "
                f"{', '.join(changed)}), so the base weight cannot be restored; give it its values back first"
            )
        return tensors

    def merged(self, root: nn.Module, role: str, base: Tensor) -> Tensor:
        """A base parameter in float64, "weight" or "bias", with the adapter in it."""
        return self.adapter.kind.merged(role, base, self._operands(root, base.device))

    def unmerged(self, root: nn.Module, role: str, merged: Tensor) -> Tensor | None:
        """The inverse of `merged`, up to rounding; None if the kind has none."""
        return self.adapter.kind.unmerged(role, merged, self._operands(root, merged.device))

    def _operands(self, root: nn.Module, device: torch.device) -> Operands:
        tensors = {suffix: tensor.to(device) for suffix, tensor in self.values(root).items()}
        return self.adapter.operands(self.site, tensors, self.numbers)


def bytes_of(tensor: Tensor) -> int:
    """How many bytes a tensor's elements take."""
    return tensor.numel() * tensor.element_size()
