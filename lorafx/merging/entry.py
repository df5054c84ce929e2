"""Entries: one merged parameter, what was merged into it, and the way back.

    W' = round(W + Σ ΔW)        with W and ΔW in float32, or in float64 for a weight in float64

Other kinds than additive ones have their own W'. Subtracting ΔW again would not give W back, so an entry keeps what
rounding took (`residual.py`), or a copy if that is smaller or the kind has no inverse. It goes by blocks of rows, and
writes each before it looks at the next. The fingerprint of a block of W says later whether what comes back is W, before
that is written; and where something fails half way, which blocks have to be undone.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapters.storages import DENSE, Storage
from ..errors import MergeError
from ..ops.deferral import settle
from .kept import Kept
from .source import Source
from .steps import Rows, Step, blocks, steps


@dataclass(frozen=True)
class Target:
    """A base parameter that is merged into: its path, which of a site's parameters it is, and how it is stored."""

    path: str
    role: str = "weight"
    storage: Storage = DENSE

    def stored(self, root: nn.Module) -> dict[str, Tensor]:
        """The tensors that hold it, as they are now."""
        owner, _, name = self.path.rpartition(".")
        tensors = self.storage.stored(root.get_submodule(owner), name)
        return {name: tensor.detach() for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Entry:
    """What is known of one merged base parameter: what was merged into it, and how to restore the tensors that hold it.

    `kept` has the blocks of each of these tensors.
    """

    target: Target
    sources: tuple[Source, ...]
    kept: Mapping[str, list[Kept]]
    dtype: torch.dtype
    device: torch.device

    @property
    def nbytes(self) -> int:
        """Bytes kept for this parameter; copies of adapters' tensors count with the weight, not again with the bias."""
        copied = sum(source.nbytes for source in self.sources) if self.target.role == "weight" else 0
        return copied + sum(each.nbytes for blocks in self.kept.values() for each in blocks)

    def check(self, root: nn.Module) -> None:
        """Raise `MergeError` where a look at the parameter, but not at its values, says that it cannot be restored."""
        path, weight = self.target.path, root.get_parameter(self.target.path)
        if weight.is_meta:
            raise MergeError(f"{path} was merged on {self.device} and has been moved to meta, so its values are gone")
        if weight.dtype != self.dtype:
            raise MergeError(
                f"{path} was merged in {self.dtype} and is {weight.dtype} now, so its original is out of reach; "
                f"unmerge before converting a model (`.to(dtype)`), or convert it back and load the base again"
            )

    def original(self, root: nn.Module) -> dict[str, Tensor]:
        """New tensors with the values before the merge; `MergeError` if they are out of reach."""
        self.check(root)
        found = {name: torch.empty_like(tensor) for name, tensor in self.target.stored(root).items()}
        for name, rows, kept, step in self._blocks(root):
            found[name][kept.rows] = self._restored(rows, kept, step)
        return found

    def unmerge(self, root: nn.Module) -> None:
        """Write the values before the merge; `MergeError`, with none written, if they are out of reach."""
        self.check(root)
        settle(root.get_parameter(self.target.path))
        former: list[Tensor | None] = []
        try:
            for _, rows, kept, step in self._blocks(root):
                original = self._restored(rows, kept, step)
                former.append(None if kept.residual else rows.clone())
                rows.copy_(original)
        except BaseException:
            for (_, rows, kept, step), before in zip(self._blocks(root), former):
                if before is not None:
                    rows.copy_(before)
                elif step is not None and kept.is_original(rows):
                    rows.copy_(step.merged(rows))
            raise

    def undo(self, root: nn.Module) -> None:
        """Write the values before the merge into those blocks that have others: after a merge that failed."""
        for _, rows, kept, step in self._blocks(root):
            if not kept.is_original(rows):
                rows.copy_(kept.copy if kept.copy is not None else self._restored(rows, kept, step))

    def _restored(self, rows: Tensor, kept: Kept, step: Step | None) -> Tensor:
        found = kept.restored(rows, step)
        if found is None:
            raise MergeError(
                f"{self.target.path} cannot be restored exactly: it has been changed since the merge, or what its "
                f"adapters do comes out differently now than on {self.device}, where it was merged; nothing was changed"
            )
        return found

    def _blocks(self, root: nn.Module) -> Iterator[tuple[str, Tensor, Kept, Step | None]]:
        """Each block of each tensor as it is now, with what is kept of it; for dense weights with what adapters do."""
        for name, tensor in self.target.stored(root).items():
            kept = self.kept.get(name, [])
            found: Iterable[Step | None] = itertools.repeat(None)
            if self.target.storage == DENSE:
                found = _steps(self.target, tensor, self.sources, [each.rows for each in kept])
            for each, step in zip(kept, found):
                yield name, tensor[each.rows], each, step


def merge(root: nn.Module, target: Target, sources: tuple[Source, ...], *, safe: bool = False) -> Entry:
    """Write a parameter with these adapters in it; returns what leads back. If it fails, all is as before.

    Raises `MergeError` for what cannot be merged, and, if `safe`, for values that are not finite.
    """
    weight, stored = root.get_parameter(target.path), target.stored(root)
    if weight.is_meta:
        raise MergeError(f"{target.path} is on the meta device and has no values to merge into")
    settle(weight)
    kept: dict[str, list[Kept]] = {name: [] for name in stored}
    entry = Entry(target, sources, kept, weight.dtype, weight.device)
    try:
        for name, rows, merged, guess in (_dense if target.storage == DENSE else _packed)(target, stored, sources):
            if safe and not merged.isfinite().all():
                raise MergeError(
                    f"merging would leave values in {target.path} that are not finite; nothing was changed"
                )
            kept[name].append(Kept.of(rows, stored[name][rows], merged, guess))
            stored[name][rows].copy_(merged)
    except BaseException:
        entry.undo(root)
        raise
    return entry


_Changes = Iterator[tuple[str, Rows, Tensor, Tensor | None]]  # a tensor's name, rows of it, their new values, the guess


def _dense(target: Target, stored: Mapping[str, Tensor], sources: tuple[Source, ...]) -> _Changes:
    weight = stored["weight"]
    whole = blocks(sources, weight)
    for rows, step in zip(whole, _steps(target, weight, sources, whole)):
        merged = step.merged(weight[rows]).to(weight.dtype)
        guess = step.unmerged(merged)
        yield "weight", rows, merged, None if guess is None else guess.to(weight.dtype)


def _packed(target: Target, stored: Mapping[str, Tensor], sources: tuple[Source, ...]) -> _Changes:
    if target.storage.lossy:
        warnings.warn(f"{target.path} is stored as {target.storage}: merging into it loses what that cannot hold")
    dense = target.storage.dense(stored)
    (step,) = _steps(target, dense, sources, [...])
    for name, merged in target.storage.packed(step.merged(dense), stored).items():
        yield name, ..., merged, None


def _steps(target: Target, weight: Tensor, sources: tuple[Source, ...], rows: list[Rows]) -> Iterator[Step]:
    """What these do to a dense weight, block by block: in float32 or its own dtype, the wider of both.

    What is packed again is computed in float64.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32) if target.storage == DENSE else torch.float64
    return steps(sources, target.role, torch.empty((), dtype=dtype, device=weight.device).expand(weight.shape), rows)
