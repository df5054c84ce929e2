"""Entries: one merged parameter, what was merged into it, and the way back.

    W' = round(W + Σ ΔW)        with W and ΔW in float32, or in float64 for a weight in float64

Other kinds than additive ones have their own W'. Subtracting ΔW again would not give W back, so an entry keeps what
rounding took (`residual.py`), or a copy if that is smaller or the kind has no inverse. It goes by blocks of rows, and
writes each before it looks at the next. The fingerprint of a block of W says later whether what comes back is W, before
that is written; and where something fails half way, which blocks have to be undone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapters.storages import DENSE, Storage
from ..errors import MergeError
from ..ops.deferral import settle
from ..tree.lookup import tensor_at
from .kept import Kept
from .scratch import Memory, Scratch, fresh
from .source import Source
from .steps import Step, blocks, steps
from .update import Rows


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

    def write(self, root: nn.Module, values: Mapping[str, Tensor]) -> None:
        """Write into these tensors; deferred logits that still have to read the old values are computed first."""
        settle(tensor_at(root, self.path))
        for name, tensor in self.stored(root).items():
            if name in values:
                tensor.copy_(values[name])
        self.written(root)

    def written(self, root: nn.Module) -> None:
        """Tell the storage that they have been written to."""
        self.storage.written(root.get_submodule(self.path.rpartition(".")[0]))


@dataclass(frozen=True)
class Entry:
    """What is known of one merged base parameter: what was merged into it, and how to restore the tensors that hold it.

    `kept` has the blocks of each of these tensors. `lost` is the share of the merged weight that its storage cannot
    hold, as the Frobenius norm of the one to that of the other.
    """

    target: Target
    sources: tuple[Source, ...]
    kept: Mapping[str, list[Kept]]
    dtype: torch.dtype
    device: torch.device
    lost: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes kept for this parameter; copies of adapters' tensors count with the weight, not again with the bias."""
        copied = sum(source.nbytes for source in self.sources) if self.target.role == "weight" else 0
        return copied + sum(each.nbytes for blocks in self.kept.values() for each in blocks)

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

    def original(self, root: nn.Module) -> dict[str, Tensor]:
        """New tensors with the values before the merge; `MergeError` if they are out of reach."""
        self.check(root)
        found = {name: torch.empty_like(tensor) for name, tensor in self.target.stored(root).items()}
        for name, rows, kept, step in self._blocks(root, Scratch()):
            found[name][kept.rows] = self._restored(rows, kept, step)
        return found

    def unmerge(self, root: nn.Module, scratch: Scratch | None = None) -> None:
        """Write the values before the merge; `MergeError`, with none written, if they are out of reach."""
        self.check(root)
        settle(tensor_at(root, self.target.path))
        scratch = scratch or Scratch()
        former: list[Tensor | None] = []
        try:
            for _, rows, kept, step in self._blocks(root, scratch):
                original = self._restored(rows, kept, step)
                former.append(None if kept.residual else rows.clone())
                rows.copy_(original)
            self.target.written(root)
        except BaseException:
            for (_, rows, kept, step), before in zip(self._blocks(root, scratch), former):
                if before is not None:
                    rows.copy_(before)
                elif step is not None and kept.is_original(rows):
                    rows.copy_(step.merged(rows))
            raise

    def undo(self, root: nn.Module) -> None:
        """Write the values before the merge into those blocks that have others: after a merge that failed."""
        for _, rows, kept, step in self._blocks(root, Scratch()):
            if not kept.is_original(rows):
                rows.copy_(kept.copy if kept.copy is not None else self._restored(rows, kept, step))
        self.target.written(root)

    def _restored(self, rows: Tensor, kept: Kept, step: Step | None) -> Tensor:
        found = kept.restored(rows, step)
        if found is None:
            raise MergeError(
                f"{self.target.path} cannot be restored exactly: it has been changed since the merge, or what its "
                f"adapters do comes out differently now than on {self.device}, where it was merged; nothing was changed"
            )
        return found

    def _blocks(self, root: nn.Module, memory: Memory) -> Iterator[tuple[str, Tensor, Kept, Step | None]]:
        """Each block of each tensor as it is now, with what is kept of it; for dense weights with what adapters do."""
        for name, tensor in self.target.stored(root).items():
            kept = self.kept.get(name, [])
            found: Iterable[Step | None] = itertools.repeat(None)
            if self.target.storage == DENSE:
                found = _steps(self.target, tensor, self.sources, [each.rows for each in kept], memory)
            for each, step in zip(kept, found):
                yield name, tensor[each.rows], each, step


def merge(
    root: nn.Module,
    target: Target,
    sources: tuple[Source, ...],
    scratch: Scratch | None = None,
    *,
    safe: bool = False,
) -> Entry:
    """Write a parameter with these adapters in it; returns what leads back. If it fails, all is as before.

    Who merges many gives the same `scratch` for all. Raises `MergeError` for what cannot be merged, and, if `safe`, for
    values that are not finite.
    """
    weight, stored = tensor_at(root, target.path), target.stored(root)
    if weight.is_meta:
        raise MergeError(f"{target.path} is on the meta device and has no values to merge into")
    settle(weight)
    kept: dict[str, list[Kept]] = {name: [] for name in stored}
    is_dense = target.storage == DENSE
    memory = scratch or Scratch()
    changes, lost = (_dense(target, stored, sources, memory), 0.0) if is_dense else _packed(target, stored, sources)
    entry = Entry(target, sources, kept, weight.dtype, weight.device, lost)
    try:
        for name, rows, original, merged, guess in changes:
            if safe and not merged.isfinite().all():
                raise MergeError(
                    f"merging would leave values in {target.path} that are not finite; nothing was changed"
                )
            kept[name].append(Kept.of(rows, original, merged, guess))
            original.copy_(merged)
    except BaseException:
        entry.undo(root)
        raise
    target.written(root)
    return entry


# A tensor's name, some rows of it, these as they are and as they become, and the guess.
_Changes = Iterable[tuple[str, Rows, Tensor, Tensor, Tensor | None]]


def _dense(target: Target, stored: Mapping[str, Tensor], sources: tuple[Source, ...], memory: Memory) -> _Changes:
    weight = stored["weight"]
    whole = blocks(sources, weight)
    for rows, step in zip(whole, _steps(target, weight, sources, whole, memory)):
        original = weight[rows]
        merged = _rounded(step.merged(original), weight.dtype, "rounded", memory)
        guess = step.unmerged(merged)
        if guess is not None:
            guess = _rounded(guess, weight.dtype, "guess", memory)
        yield "weight", rows, original, merged, guess


def _rounded(wide: Tensor, dtype: torch.dtype, name: str, memory: Memory) -> Tensor:
    return wide if wide.dtype == dtype else memory(name, wide.shape, dtype, wide.device).copy_(wide)


def _packed(target: Target, stored: Mapping[str, Tensor], sources: tuple[Source, ...]) -> tuple[_Changes, float]:
    """The changes of a weight that is packed again, and the share of it that is lost by that."""
    dense = target.storage.dense(stored)
    (step,) = _steps(target, dense, sources, [...], fresh)
    wanted = step.merged(dense)
    try:
        packed = target.storage.packed(wanted, stored)
    except MergeError as error:
        raise MergeError(f"{target.path}: {error}") from error
    lost = (target.storage.dense({**stored, **packed}) - wanted).norm() / wanted.norm()
    return [(name, ..., stored[name], merged, None) for name, merged in packed.items()], float(lost.nan_to_num())


def _steps(
    target: Target, weight: Tensor, sources: tuple[Source, ...], rows: list[Rows], memory: Memory
) -> Iterator[Step]:
    """What these do to a dense weight, block by block: in float32 or its own dtype, the wider of both.

    What is packed again is computed in float64.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32) if target.storage == DENSE else torch.float64
    like = torch.empty((), dtype=dtype, device=weight.device).expand(weight.shape)
    return steps(sources, target.role, like, rows, memory)
