"""Batches: parameters that are alike, merged into and restored together, a block of rows after another.

    W' = round(W + Σ ΔW)        with W and ΔW in float32, or in float64 for a weight in float64

Other kinds than additive ones have their own W'. Subtracting ΔW again would not give W back, so of each block is kept
what rounding took (`residual.py`), or a copy if that is smaller or the kind has no inverse. A block is written before
the next is looked at. The fingerprint of a block of W says later whether what comes back is W, before that is written;
and where something fails half way, which blocks have to be undone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapters.storages import DENSE
from ..errors import MergeError
from ..ops.deferral import settle
from ..tree.lookup import tensor_at
from .entry import Entry
from .kept import Kept
from .scratch import Memory, Scratch, fresh
from .steps import Rows, Step, blocks, elements, steps


def batches(root: nn.Module, entries: Iterable[Entry]) -> list[list[Entry]]:
    """These in batches: dense weights that are alike, of which several fit a block; all others by themselves."""
    alike: dict[object, list[Entry]] = {}
    for number, entry in enumerate(entries):
        alike.setdefault(_likeness(root, entry) or number, []).append(entry)
    found = []
    for group in alike.values():
        weight = tensor_at(root, group[0].target.path)
        count = max(1, elements(weight.device) // max(1, weight.numel()))
        found += [group[start : start + count] for start in range(0, len(group), count)]
    return found


def _likeness(root: nn.Module, entry: Entry) -> object | None:
    """What entries have to share, for the same operators to work on both; None for one that is like no other."""
    additive = all(source.adapter.kind.additive for source in entry.sources)
    if entry.target.storage != DENSE or not additive:
        return None
    weight = tensor_at(root, entry.target.path)
    by_source = ((id(s.adapter), s.site.reading, *(t.shape for t in s.tensors.values())) for s in entry.sources)
    kept = str([each.rows for each in entry.kept.get("weight", ())])
    return entry.target.role, weight.shape, weight.dtype, weight.device, kept, *by_source


def merge(root: nn.Module, entries: Sequence[Entry], memory: Memory | None = None, *, safe: bool = False) -> None:
    """Write the parameters of a batch with their adapters in them. If it fails, all is as before.

    Who merges many gives the same `memory` for all. Raises `MergeError` for what cannot be merged, and, if `safe`, for
    values that are not finite.
    """
    settle([tensor_at(root, entry.target.path) for entry in entries])
    dense = entries[0].target.storage == DENSE
    changes = _dense(root, entries, memory or Scratch()) if dense else _packed(root, *entries)
    try:
        for name, rows, originals, merged, guesses in changes:
            for entry, original, new, guess in zip(entries, originals, merged, guesses):
                if safe and not new.isfinite().all():
                    raise MergeError(
                        f"merging would leave values in {entry.target.path} that are not finite; nothing was changed"
                    )
                entry.kept.setdefault(name, []).append(Kept.of(rows, original, new, guess))
                original.copy_(new)
        for entry in entries:
            entry.target.written(root)
    except BaseException:
        for entry in entries:
            _undo(root, entry)
            entry.kept.clear()
        raise


# A tensor's name, some rows of it in each parameter, these as they are and as they become, and guesses.
_Changes = Iterator[tuple[str, Rows, Sequence[Tensor], Sequence[Tensor], Sequence[Tensor | None]]]


def _dense(root: nn.Module, entries: Sequence[Entry], memory: Memory) -> _Changes:
    weights = [entry.target.stored(root)["weight"] for entry in entries]
    whole = blocks(entries[0].sources, weights[0])
    for rows, step in zip(whole, _steps(entries, weights[0], whole, memory)):
        originals = [weight[rows] for weight in weights]
        merged = _rounded(step.merged(_stack(originals, memory)), weights[0].dtype, "rounded", memory)
        guesses = _guesses(step, merged, memory)
        yield "weight", rows, originals, merged.unbind(), guesses


def _guesses(step: Step, merged: Tensor, memory: Memory) -> Sequence[Tensor | None]:
    guess = step.unmerged(merged)
    return [None] * len(merged) if guess is None else _rounded(guess, merged.dtype, "guess", memory).unbind()


def _rounded(wide: Tensor, dtype: torch.dtype, name: str, memory: Memory) -> Tensor:
    return wide if wide.dtype == dtype else memory(name, wide.shape, dtype, wide.device).copy_(wide)


def _stack(tensors: list[Tensor], memory: Memory) -> Tensor:
    first = tensors[0]
    if len(tensors) == 1:
        return first[None]
    return torch.stack(tensors, out=memory("stack", (len(tensors), *first.shape), first.dtype, first.device))


def _packed(root: nn.Module, entry: Entry) -> _Changes:
    """The changes of a weight that is packed again; the entry is told which share of it is lost by that."""
    storage, stored = entry.target.storage, entry.target.stored(root)
    dense = storage.dense(stored)
    (step,) = _steps([entry], dense, [...], fresh)
    wanted = step.merged(dense[None])[0]
    try:
        packed = storage.packed(wanted, stored)
    except MergeError as error:
        raise MergeError(f"{entry.target.path}: {error}") from error
    lost = (storage.dense({**stored, **packed}) - wanted).norm() / wanted.norm()
    entry.lost = float(lost.nan_to_num())
    for name, new in packed.items():
        yield name, ..., [stored[name]], [new], [None]


def _steps(entries: Sequence[Entry], weight: Tensor, rows: list[Rows], memory: Memory) -> Iterator[Step]:
    """What is done to dense weights, block by block: in float32 or their own dtype, the wider of both.

    What is packed again is computed in float64.
    """
    target = entries[0].target
    dtype = torch.promote_types(weight.dtype, torch.float32) if target.storage == DENSE else torch.float64
    like = torch.empty((), dtype=dtype, device=weight.device).expand(weight.shape)
    return steps([entry.sources for entry in entries], target.role, like, rows, memory)


@dataclass(frozen=True)
class _Block:
    """Some rows of a tensor of each entry, as they are now, with what is kept of them and what adapters do to them."""

    rows: list[Tensor]
    kept: list[Kept]
    step: Step | None
    memory: Memory

    def restored(self, entries: Sequence[Entry]) -> list[Tensor]:
        """The rows before the merge; `MergeError` if they are out of reach."""
        guesses: Sequence[Tensor | None] = [None] * len(self.rows)
        if self.step is not None and any(kept.residual for kept in self.kept):
            guesses = _guesses(self.step, _stack(self.rows, self.memory), self.memory)
        return [_restored(*each) for each in zip(entries, self.kept, self.rows, guesses)]

    def merge_again(self, before: Sequence[Tensor | None]) -> None:
        """Undo a restore: of what has a residual by merging, of others by copies from `before`."""
        again = self.rows if self.step is None else self.step.merged(_stack(self.rows, self.memory))
        for rows, kept, merged, copy in zip(self.rows, self.kept, again, before):
            if copy is not None:
                rows.copy_(copy)
            elif kept.is_original(rows):
                rows.copy_(merged)


def _restored(entry: Entry, kept: Kept, rows: Tensor, guess: Tensor | None) -> Tensor:
    found = kept.restored(rows, guess)
    if found is None and kept.is_original(rows):
        return rows
    if found is None:
        raise MergeError(
            f"{entry.target.path} cannot be restored exactly: it has been changed since the merge, or what its "
            f"adapters do comes out differently now than on {entry.device}, where it was merged; nothing was changed"
        )
    return found


def _blocks(root: nn.Module, entries: Sequence[Entry], memory: Memory) -> Iterator[tuple[str, _Block]]:
    """Each block of each tensor that holds these."""
    dense, tensors = entries[0].target.storage == DENSE, [entry.target.stored(root) for entry in entries]
    for name, tensor in tensors[0].items():
        columns = list(zip(*(entry.kept.get(name, []) for entry in entries)))
        rows = [kept[0].rows for kept in columns]
        does: Iterable[Step | None] = _steps(entries, tensor, rows, memory) if dense else itertools.repeat(None)
        for kept, step in zip(columns, does):
            yield name, _Block([each[name][kept[0].rows] for each in tensors], list(kept), step, memory)


def unmerge(root: nn.Module, entries: Sequence[Entry], memory: Memory | None = None) -> None:
    """Write the values before the merge; `MergeError`, with none written, if one of them is out of reach."""
    for entry in entries:
        entry.check(root)
    settle([tensor_at(root, entry.target.path) for entry in entries])
    memory, former = memory or Scratch(), []
    try:
        for _, block in _blocks(root, entries, memory):
            originals = block.restored(entries)
            former.append([None if kept.residual else rows.clone() for kept, rows in zip(block.kept, block.rows)])
            for rows, original in zip(block.rows, originals):
                rows.copy_(original)
        for entry in entries:
            entry.target.written(root)
    except BaseException:
        for (_, block), before in zip(_blocks(root, entries, memory), former):
            block.merge_again(before)
        raise


def original(root: nn.Module, entry: Entry) -> dict[str, Tensor]:
    """New tensors with the values before the merge; `MergeError` if they are out of reach."""
    entry.check(root)
    found = {name: torch.empty_like(tensor) for name, tensor in entry.target.stored(root).items()}
    for name, block in _blocks(root, [entry], Scratch()):
        (found[name][block.kept[0].rows],) = block.restored([entry])
    return found


def _undo(root: nn.Module, entry: Entry) -> None:
    """Write the values before the merge into those blocks that have others: after a merge that failed."""
    for _, block in _blocks(root, [entry], Scratch()):
        (rows,), (kept,) = block.rows, block.kept
        if not kept.is_original(rows):
            rows.copy_(kept.copy if kept.copy is not None else block.restored([entry])[0])
    entry.target.written(root)
