"""Entries: one merged parameter, what was merged into it, and what was kept for the way back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..adapters.storages import DENSE, Storage
from ..errors import MergeError
from ..ops.deferral import settle
from ..tree.lookup import module_at, tensor_at
from .kept import Kept
from .steps import Sources


@dataclass(frozen=True)
class Target:
    """A base parameter that is merged into: its path, which of a site's parameters it is, and how it is stored."""

    path: str
    role: str = "weight"
    storage: Storage = DENSE

    def stored(self, root: nn.Module) -> dict[str, Tensor]:
        """The tensors that hold it, as they are now."""
        owner, _, name = self.path.rpartition(".")
        tensors = self.storage.stored(module_at(root, owner), name)
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def write(self, root: nn.Module, values: Mapping[str, Tensor]) -> None:
        """Write into these tensors; deferred logits that still have to read the old values are computed first."""
        settle([tensor_at(root, self.path)])
        for name, tensor in self.stored(root).items():
            if name in values:
                tensor.copy_(values[name])
        self.written(root)

    def written(self, root: nn.Module) -> None:
        """Tell the storage that they have been written to."""
        self.storage.written(module_at(root, self.path.rpartition(".")[0]))


@dataclass
class Entry:
    """One base parameter: what is merged into it, and how to restore the tensors that hold it.

    `dtype` and `device` are those it had. `kept` has the blocks of each of these tensors that are merged. `lost` is the
    share of the merged weight that its storage cannot hold, as the Frobenius norm of the one to that of the other.
    """

    target: Target
    sources: Sources
    dtype: torch.dtype
    device: torch.device
    lost: float = 0.0
    kept: dict[str, list[Kept]] = field(default_factory=dict)

    @classmethod
    def of(cls, root: nn.Module, target: Target, sources: Sources) -> Entry:
        """An entry for a parameter, into which nothing is merged yet; `MergeError` if it has no values."""
        weight = tensor_at(root, target.path)
        if weight.is_meta:
            raise MergeError(f"{target.path} is on the meta device and has no values to merge into")
        return cls(target, sources, weight.dtype, weight.device)

    @property
    def nbytes(self) -> int:
        """Bytes kept for this parameter; copies of adapters' tensors count with the weight, not again with the bias."""
        copied = sum(source.nbytes for source in self.sources) if self.target.role == "weight" else 0
        return copied + sum(each.nbytes for blocks in self.kept.values() for each in blocks)

    def is_restored(self, root: nn.Module) -> bool:
        """Whether some of it is as it was before the merge."""
        tensors = self.target.stored(root)
        return any(each.is_original(tensors[name][each.rows]) for name in self.kept for each in self.kept[name])

    def check(self, root: nn.Module) -> None:
        """Raise `MergeError` where a look at the parameter, but not at its values, says that it cannot be restored."""
        path, weight = self.target.path, tensor_at(root, self.target.path)
        if weight.is_meta:
            raise MergeError(f"{path} was merged on {self.device} and has been moved to meta, so its values are gone")
        if weight.dtype != self.dtype:
            raise MergeError(
                f"{path} was merged in {self.dtype} and is {weight.dtype} now, so its original is out of reach; "
                f"unmerge before converting a model (`.to(dtype)`), or convert it back and load the base again"
            )
