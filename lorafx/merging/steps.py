"""Steps: what adapters do to parameters that are alike, a block of rows after another.

Small parameters of one shape are a stack, (n, *shape), so that each operator works on many of them. Additive kinds add
to each row what does not depend on others, so a step is a block of so many rows as stays near the processor. Where
another kind takes part, a whole parameter is one step, and it is a stack of one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Protocol

import torch
from torch import Tensor

from ..adapters.low_rank import LowRank
from ..errors import MergeError
from .scratch import Memory
from .source import Source

Rows = slice | EllipsisType  # some rows of a tensor; `...` are all, of a tensor that has none, too
Sources = tuple[Source, ...]  # what is merged into one parameter, in order

# Elements a block, on a CPU for each thread: with less, calls take most of the time, and with more, memory does.
_ON_CPU, _ELSEWHERE = 2**18, 2**24
# Of these, how many ΔW is computed of at a time, in float64, and how many rows at least, as each time the whole right
# factor of a ΔW is read.
_IN_FLOAT64, _ROWS = 2**16, 16


class Step(Protocol):
    """What some adapters do to a block of rows of a stack, of any dtype; results are of the dtype it computes in.

    They may lie in memory that the next result of that kind is written into.
    """

    def merged(self, rows: Tensor) -> Tensor:
        """The rows, (n, count, …), with the adapters in them."""

    def unmerged(self, rows: Tensor) -> Tensor | None:
        """The rows without them, up to rounding; None if a kind has no inverse."""


def elements(device: torch.device) -> int:
    """How many elements of a stack a block has, about."""
    return _ON_CPU * torch.get_num_threads() if device.type == "cpu" else _ELSEWHERE


def blocks(sources: Sequence[Source], tensor: Tensor) -> list[Rows]:
    """The rows of a parameter in the blocks in which these can be merged into it."""
    if not tensor.ndim or not all(source.adapter.kind.additive for source in sources):
        return [...]
    return [*_slices(slice(0, len(tensor)), elements(tensor.device) // max(1, math.prod(tensor.shape[1:])))]


def _slices(rows: slice, count: int) -> Iterator[slice]:
    """These rows, about so many at a time."""
    count = max(count, 1)
    return (slice(start, min(start + count, rows.stop)) for start in range(rows.start, rows.stop, count))


def steps(stack: Sequence[Sources], role: str, like: Tensor, rows: Sequence[Rows], memory: Memory) -> Iterator[Step]:
    """The steps for these blocks of rows of a stack: `stack` has the sources of each parameter in it.

    It is computed where and as `like` is, which has the shape of one parameter.
    """
    if not all(source.adapter.kind.additive for source in stack[0]):
        (sources,) = stack
        return (yield from (_OneByOne(sources, role, like) for _ in rows))
    deltas = [_stacked([_delta(source, role, like) for source in sources]) for sources in zip(*stack)]
    for block in rows:
        shape = (len(stack), *(like.shape if block is ... else (block.stop - block.start, *like.shape[1:])))
        yield _Sum(_total(deltas, block, memory("delta", shape, like.dtype, like.device), memory), memory)


@dataclass(frozen=True)
class _Sum:
    """W + Σ ΔW"""

    delta: Tensor
    memory: Memory

    def merged(self, rows: Tensor) -> Tensor:
        rows, result = self._wide(rows, "merged")
        return torch.add(rows, self.delta, out=result)

    def unmerged(self, rows: Tensor) -> Tensor:
        rows, result = self._wide(rows, "unmerged")
        return torch.sub(rows, self.delta, out=result)

    def _wide(self, rows: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """The rows in the dtype of ΔW, and memory for a result, in which they may lie already."""
        result = self.memory(name, self.delta.shape, self.delta.dtype, self.delta.device)
        return rows if rows.dtype == result.dtype else result.copy_(rows), result


@dataclass(frozen=True)
class _OneByOne:
    """One adapter acts on what the one before it gives; of a stack of one."""

    sources: Sequence[Source]
    role: str
    like: Tensor

    def merged(self, rows: Tensor) -> Tensor:
        found = rows[0].to(self.like.dtype, copy=True)  # which a kind may write into, or give back
        for source in self.sources:
            found = source.merged(self.role, found)
            _require_shape(source, self.role, found.shape, self.like.shape)
        return found[None]

    def unmerged(self, rows: Tensor) -> Tensor | None:
        found: Tensor | None = rows[0].to(self.like.dtype, copy=True)
        for source in reversed(self.sources):
            found = None if found is None else source.unmerged(self.role, found)
        return None if found is None else found[None]


def _delta(source: Source, role: str, like: Tensor) -> LowRank | Tensor:
    delta = source.delta(role, like)
    if delta.shape != like.shape:
        _require_shape(source, role, torch.broadcast_shapes(delta.shape, like.shape), like.shape)
    return delta if isinstance(delta, LowRank) else delta.expand(like.shape)


def _require_shape(source: Source, role: str, new: torch.Size, shape: torch.Size) -> None:
    if new != shape:
        raise MergeError(f"{getattr(source.site, role)}: adapter {source.adapter.name!r} would make {tuple(new)} of it")


def _stacked(deltas: Sequence[LowRank | Tensor]) -> LowRank | Tensor:
    if isinstance(deltas[0], LowRank):
        return LowRank.stacked(deltas)  # type: ignore[arg-type]
    return deltas[0][None] if len(deltas) == 1 else torch.stack(deltas)  # type: ignore[arg-type]


def _total(deltas: Sequence[LowRank | Tensor], rows: Rows, result: Tensor, memory: Memory) -> Tensor:
    """Write the sum of some rows of these, (n, count, …), into `result`, rounded once."""
    for here, there in _parts(rows, result):
        part = result[:, here]
        first, *others = (_rows(delta, there, part, f"product {n}", memory) for n, delta in enumerate(deltas))
        part.copy_(sum(others, start=first))
    return result


def _parts(rows: Rows, result: Tensor) -> list[tuple[Rows, Rows]]:
    """Some rows in parts: where each is in the result, and which of the whole they are."""
    if isinstance(rows, slice) and result.is_cpu:
        count = max(_ROWS, _IN_FLOAT64 * torch.get_num_threads() // max(1, result[:, 0].numel()))
        if count < result.shape[1]:
            return [(slice(p.start - rows.start, p.stop - rows.start), p) for p in _slices(rows, count)]
    return [(..., rows)]


def _rows(delta: LowRank | Tensor, rows: Rows, result: Tensor, name: str, memory: Memory) -> Tensor:
    if isinstance(delta, LowRank):
        return delta.rows(rows, memory(name, result.shape, torch.float64, result.device))
    return delta[:, rows]
