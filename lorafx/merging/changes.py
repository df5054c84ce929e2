"""What adapters make of a base's tensors, each by itself: of the model, only shapes and names are needed for it.

It is what merging in memory gives (`ledger.py`): a base tensor of which an adapter has its own copy is replaced by
that; others have the adapters merged into them, one after another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.kinds import Operands
from ..adapters.site import Site
from ..errors import AdapterError, MergeError
from ..tree.lookup import tensor_at
from .ledger import targets_of

_BLOCK = 1 << 19  # weights that are merged at a time: in float64, some of them fit the cache together


@dataclass(frozen=True)
class Values:
    """An adapter that fits a model, with its tensors by path, and base tensors saved along (embeddings), by path."""

    adapter: Adapter
    tensors: Mapping[str, Tensor]
    base: Mapping[str, Tensor]


@dataclass(frozen=True)
class Update:
    """What one adapter does to one base parameter, which is a site's "weight" or "bias"."""

    adapter: Adapter
    site: Site
    role: str
    tensors: Mapping[str, Tensor]

    def operands(self) -> Operands:
        """The adapter's tensors and numbers at the site, in float64."""
        numbers = self.adapter.kind.numbers(self.site, self.adapter.config)
        return self.adapter.operands(self.site, self.tensors, numbers)

    def of_rows(self, at: Operands, start: int, stop: int) -> Operands | None:
        """What is needed for some rows alone; None if a row cannot be merged without the others."""
        return self.adapter.kind.rows(self.role, at, start, stop)

    def merged(self, dense: Tensor, at: Operands | None, what: str) -> Tensor:
        """The parameter in float64, or some rows of it, with the adapter in them."""
        assert at is not None, "only what goes by rows is cut into blocks"
        result = self.adapter.kind.merged(self.role, dense, at)
        if result.shape != dense.shape:
            raise MergeError(f"{what}: adapter {self.adapter.name!r} would make {tuple(result.shape)} of it")
        return result


@dataclass(frozen=True)
class Change:
    """What becomes of a tensor: `own` is the adapter's that stands in for the base's, `updates` act on it in order."""

    own: Tensor | None = None
    updates: tuple[Update, ...] = ()

    def blocks(
        self, read: Callable[[int, int], Tensor], shape: tuple[int, ...], dtype: torch.dtype, what: str
    ) -> Iterator[Tensor]:
        """The tensor as it becomes, in blocks of whole rows; `read` gives rows of the base's, from one to another.

        Computed in float64 and rounded once. Raises `MergeError`, naming it as `what`, if it does not fit `dtype`.
        """
        operands = [update.operands() for update in self.updates]
        rows = shape[0] if shape else 1
        by_rows = all(update.of_rows(at, 0, 1) is not None for update, at in zip(self.updates, operands))
        step = max(1, _BLOCK * rows // max(1, math.prod(shape))) if by_rows else rows
        for start in range(0, rows, max(1, step)):
            stop = min(rows, start + step)
            dense = read(start, stop) if self.own is None else rounded(_part(self.own, start, stop), dtype, what)
            dense = dense.double() if self.updates else dense
            for update, at in zip(self.updates, operands):
                part = at if stop - start == rows else update.of_rows(at, start, stop)
                dense = update.merged(dense, part, what)
            yield rounded(dense, dtype, what)


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
    updates = _updates(root, loaded, first | {id(tensor_at(root, base)): copy for base, copy in copies.items()})
    own = {path: tensor for each in loaded for path, tensor in each.tensors.items()}
    saved = {first[id(tensor_at(root, path))]: tensor for each in loaded for path, tensor in each.base.items()}
    values = own | saved
    paths = {name: copy_at.get(_place(root, name), first[id(tensor)]) for name, tensor in named}
    made = {path: Change(values.get(path), updates.get(path, ())) for path in paths.values()}
    return {name: made[path] for name, path in paths.items() if path in values or path in updates}


def _place(root: nn.Module, path: str) -> tuple[int, str]:
    """The module that owns a tensor, which may have several names, and what it calls it."""
    owner, _, last = path.rpartition(".")
    return id(root.get_submodule(owner)), last


def _updates(root: nn.Module, loaded: Sequence[Values], targets: Mapping[int, str]) -> dict[str, tuple[Update, ...]]:
    """What adapters do to each of the `targets`, which are paths by the ids of base parameters."""
    found: dict[str, tuple[Update, ...]] = {}
    for each in loaded:
        adapter = each.adapter
        for site in adapter.selection:
            tensors = {suffix: each.tensors[path] for suffix, path in adapter.tensors[site.name].items()}
            for target in targets_of(root, adapter, site, targets):
                update = Update(adapter, site, target.role, tensors)
                found[target.path] = (*found.get(target.path, ()), update)
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
