"""What adapters make of a base's tensors, each by itself: of the model, only shapes and names are needed for it.

It is what merging in memory gives (`ledger.py`): a base tensor of which an adapter has its own copy is replaced by
that; others have the adapters merged into them, one after another.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.tying import read_at
from ..errors import AdapterError, MergeError
from ..tree.lookup import tensor_at
from .ledger import targets_of
from .scratch import fresh
from .source import Source
from .steps import Rows, blocks, steps


@dataclass(frozen=True)
class Values:
    """An adapter that fits a model, with its tensors by path, and base tensors saved along (embeddings), by path."""

    adapter: Adapter
    tensors: Mapping[str, Tensor]
    base: Mapping[str, Tensor]


@dataclass(frozen=True)
class Change:
    """What becomes of a tensor: `own` is the adapter's that stands in for the base's, `sources` are merged into it.

    `role` is which of their sites' parameters it is, "weight" or "bias".
    """

    own: Tensor | None = None
    sources: tuple[Source, ...] = ()
    role: str = "weight"

    def blocks(
        self, read: Callable[[int, int], Tensor], shape: tuple[int, ...], dtype: torch.dtype, what: str
    ) -> Iterator[Tensor]:
        """The tensor as it becomes, in blocks of whole rows; `read` gives rows of the base's, from one to another.

        Computed in float32 or a wider dtype of the two, as in memory. Raises `MergeError`, naming it as `what`, if it
        does not fit `dtype`.
        """
        like, count = torch.empty((), dtype=dtype, device="cpu").expand(shape), shape[0] if shape else 1
        whole = blocks(self.sources, like)
        parts = (self._rows(read, *_ends(rows, count), dtype, what) for rows in whole)
        first = next(parts)
        wide = torch.promote_types(torch.promote_types(dtype, first.dtype), torch.float32)
        like = torch.empty((), dtype=wide, device="cpu").expand(shape)
        does = steps([self.sources], self.role, like, whole, fresh) if self.sources else ()
        for part, step in itertools.zip_longest(itertools.chain([first], parts), does):
            yield rounded(part if step is None else step.merged(part[None])[0], dtype, what)

    def _rows(self, read: Callable[[int, int], Tensor], start: int, stop: int, dtype: torch.dtype, what: str) -> Tensor:
        return read(start, stop) if self.own is None else rounded(_part(self.own, start, stop), dtype, what)


def _ends(rows: Rows, count: int) -> tuple[int, int]:
    return (0, count) if rows is ... else rows.indices(count)[:2]


def _part(tensor: Tensor, start: int, stop: int) -> Tensor:
    return tensor[start:stop] if tensor.dim() else tensor


def rounded(tensor: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """The tensor in `dtype`; `MergeError`, naming it as `what`, if numbers become infinite by that."""
    result = tensor.to(dtype)
    if _is_infinite(result) and not _is_infinite(tensor):
        raise MergeError(f"{what} holds numbers too large for {dtype}; give a wider `dtype`, as bfloat16")
    return result


def _is_infinite(tensor: Tensor) -> bool:
    """Whether a number is infinite or none; the largest says so in a fraction of the time that `isfinite` takes."""
    return tensor.is_floating_point() and tensor.numel() > 0 and not tensor.abs().max().isfinite()


UNCHANGED = Change()  # of a tensor that no adapter concerns


def changes_of(root: nn.Module, loaded: Sequence[Values]) -> dict[str, Change]:
    """What becomes of each tensor of a model that these adapters change, by each of its names.

    The model may be on the meta device. Names of one parameter, where it stays one, have the same `Change`. Raises
    `AdapterError` if two adapters replace one tensor, and `MergeError` for a site that cannot be merged.
    """
    _require_apart(loaded)
    named = [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    for name, tensor in named:
        first.setdefault(id(tensor), name)
    copies = {base: copy for each in loaded for base, copy in each.adapter.replaced.items()}
    copy_at = {_place(root, base): copy for base, copy in copies.items()}
    changed = _merged_into(root, loaded, read_at(root, first, copies))
    own = {path: tensor for each in loaded for path, tensor in each.tensors.items()}
    saved = {first[id(tensor_at(root, path))]: tensor for each in loaded for path, tensor in each.base.items()}
    values = own | saved
    paths = {name: copy_at.get(_place(root, name), first[id(tensor)]) for name, tensor in named}
    made = {path: replace(changed.get(path, UNCHANGED), own=values.get(path)) for path in paths.values()}
    return {name: made[path] for name, path in paths.items() if path in values or path in changed}


def _place(root: nn.Module, path: str) -> tuple[int, str]:
    """The module that owns a tensor, which may have several names, and what it calls it."""
    owner, _, last = path.rpartition(".")
    return id(root.get_submodule(owner)), last


def _merged_into(root: nn.Module, loaded: Sequence[Values], places: Mapping[int, Sequence[str]]) -> dict[str, Change]:
    """What adapters do to each base parameter, at the `places` where it is read, by its identity."""
    found: dict[str, Change] = {}
    for each in loaded:
        adapter = each.adapter
        for site in adapter.selection:
            tensors = {suffix: each.tensors[path] for suffix, path in adapter.tensors[site.name].items()}
            source = Source(adapter, site, adapter.kind.numbers(site, adapter.config), tensors)
            for target in targets_of(root, adapter, site, places):
                before = found.get(target.path, Change(role=target.role))
                found[target.path] = replace(before, sources=(*before.sources, source))
    return found


def _require_apart(loaded: Sequence[Values]) -> None:
    owners: dict[str, str] = {}
    for each in loaded:
        for base in each.adapter.replaced:
            if base in owners:
                raise AdapterError(
                    f"{owners[base]!r} and {each.adapter.name!r} cannot be merged together: each has its own {base}"
                )
            owners[base] = each.adapter.name
