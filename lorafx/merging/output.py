"""The merged checkpoint as a plan: of each file its tensors, and how the bytes of each come about when asked for.

A tensor is the base's as it is, or in another dtype; or the base's with a change (`changes.py`), by blocks of rows; or
one of several that transformers converts into tensors of the model, which are converted, changed and converted back.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError, MergeError
from ..files.base import BaseFolder
from ..files.shards import Entry, Shard, bytes_of
from ..torch_private.loading import Conversion, kept_in_float32
from .changes import UNCHANGED, Change, changes_of
from .fitting import Fitted
from .packed import FLOATS, dense_keys, require_dense


@dataclass(frozen=True)
class Piece:
    """A tensor of a merged file: what the file's header says of it, and its bytes in pieces."""

    entry: Entry
    data: Callable[[], Iterator[memoryview]]


class Output:
    """What becomes of a base's checkpoint: `files` has the tensors of each file, by key.

    `added` are tensors that the base's files lack, by key: copies that adapters have of tied tensors, or of modules
    that are none of the checkpoint's. With a `dtype` tensors of floats are cast to it, where transformers would.
    Raises `CheckpointError` and `MergeError` for whatever cannot be merged and written; nothing is written yet.
    """

    def __init__(self, base: BaseFolder, fitted: Fitted, dtype: torch.dtype | None):
        self.base, self.fitted, self.dtype = base, fitted, dtype
        self.entries = base.entries
        self.keeps = (lambda name: False) if dtype is None else kept_in_float32(fitted.model, dtype)
        self.changes = changes_of(fitted.model, fitted.adapters)
        self.packed: set[str] = set()
        if base.quantised is not None:
            dense = dense_keys(base, fitted.loading)
            require_dense(base, fitted.loading.names, self.changes, dense)
            self.packed = self.entries.keys() - dense
        self.keys = {name: key for key, name in fitted.loading.names.items()}
        self.names = fitted.loading.names | {k: each.name for each in fitted.loading.conversions for k in each.patterns}
        self.conversions = self._conversions()
        self.convert = functools.lru_cache(maxsize=2)(self._convert)  # a file's order may mix two, as up and down
        self.names_added: set[str] = set()
        self.added = self._added()
        self.files = {name: self._pieces(shard) for name, shard in base.shards.items()}
        self.files[max(self.files)] |= self.added

    @property
    def is_untied(self) -> bool:
        """Whether tensors that the config ties are all there by themselves, and not all the same any more."""
        there = self.keys.keys() | self.names_added
        ties = self.fitted.model.all_tied_weights_keys
        apart = any(self.changes.get(name) is not self.changes.get(other) for name, other in ties.items())
        return apart and there.issuperset({*ties, *ties.values()})

    def _pieces(self, shard: Shard) -> dict[str, Piece]:
        pieces = {}
        for key, entry in shard.entries.items():
            name = self.fitted.loading.names.get(key)
            if key in self.conversions:
                pieces[key] = Piece(self._entry(key), functools.partial(self._of_conversion, key))
            elif name in self.changes or self._entry(key) != entry:
                pieces[key] = self._changed(key, self.changes.get(name or "", UNCHANGED))
            else:
                pieces[key] = Piece(entry, functools.partial(shard.chunks, key))
        return pieces

    def _entry(self, key: str) -> Entry:
        """What a tensor of the base will be stored as."""
        entry, name = self.entries[key], self.names.get(key, key)
        own = self.fitted.loading.own.get(name)
        kept = key in self.packed or self.keeps(name) or (own is not None and own.dtype != self.dtype)
        return entry if self.dtype is None or kept or entry.torch_dtype not in FLOATS else entry.cast(self.dtype)

    def _changed(self, key: str, change: Change, source: str | None = None) -> Piece:
        """The tensor of the base at `source`, or at the same key, with a change."""
        source = source or key
        stored, entry, shard = self.entries[source], self._entry(source), self.base.shard_of(source)
        name = self.fitted.loading.names.get(source)
        wanted = tuple(self.fitted.loading.own[name].shape) if name else stored.shape
        if stored.shape != wanted:
            raise CheckpointError(f"{shard.file}: {source} is {stored.shape}, and the config makes {wanted} of it")
        if stored.torch_dtype not in FLOATS and (change.sources or stored.torch_dtype is None):
            raise MergeError(f"{shard.file}: {source} is stored as {stored.dtype}, which cannot be merged into")
        return _piece(entry, change, functools.partial(shard.tensor, source), key)

    # --- tensors that the base's files lack ---------------------------------------------------------------------------

    def _added(self) -> dict[str, Piece]:
        added: dict[str, Piece] = {}
        for names in self._names_of_parameters():
            for name in self._lacking(names):
                change = self.changes.get(name, UNCHANGED)
                key = self.fitted.loading.key_of(name)
                source = next((self.keys[other] for other in names if other in self.keys), None)
                if key is None or (source is None and change.own is None):
                    raise CheckpointError(f"{self.base.folder} has no {name}, which the adapter changes")
                added[key] = self._changed(key, change, source) if source else self._new(key, change)
                self.names_added.add(name)
        return added

    def _names_of_parameters(self) -> list[list[str]]:
        """The names of each tensor that the model saves, those first to which others are tied."""
        model, names = self.fitted.model, dict[int, list[str]]()
        sources = set(model.all_tied_weights_keys.values())
        for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
            if name in self.fitted.loading.own:
                names.setdefault(id(tensor), []).append(name)
        return [sorted(group, key=lambda name: name not in sources) for group in names.values()]

    def _lacking(self, names: list[str]) -> list[str]:
        """Which of a tensor's names need a key that the checkpoint lacks; the first is that to which others are tied.

        Where all stay one, a single key is enough. Where they part, what has left the source needs its own, and so does
        the source; what goes on with the source is tied to it again by whoever loads the model.
        """
        here = self.keys.keys() | self.names_converted
        parts = {id(self.changes.get(name)) for name in names}
        if len(parts) == 1:
            return [] if names[0] not in self.changes or here & set(names) else names[:1]
        source = self.changes.get(names[0])
        apart = [name for name in names[1:] if self.changes.get(name) is not source]
        return [name for name in (names[0], *apart) if name not in here]

    def _new(self, key: str, change: Change) -> Piece:
        """A tensor of an adapter that the base has none of, in the dtype of most of the base's numbers."""
        assert change.own is not None
        counts = Counter[torch.dtype]()
        for entry in self.entries.values():
            if entry.torch_dtype in FLOATS:
                counts[entry.torch_dtype] += entry.nbytes  # type: ignore[index]
        usual = self.dtype or (counts.most_common(1)[0][0] if counts else change.own.dtype)
        entry = Entry.of(change.own)
        own = change.own
        return _piece(entry.cast(usual) if own.is_floating_point() else entry, change, lambda start, stop: own, key)

    # --- tensors that transformers converts ---------------------------------------------------------------------------

    def _conversions(self) -> dict[str, Conversion]:
        """The conversions that make a tensor which an adapter changes, by each of their keys."""
        found: dict[str, Conversion] = {}
        self.names_converted: set[str] = set()
        for conversion in self.fitted.loading.conversions:
            names, back = self._tried(conversion)
            if names & self.changes.keys():
                shapes = {key: self.entries[key].shape for key in conversion.patterns}
                if back != shapes:
                    raise MergeError(
                        f"{self.base.folder}: transformers makes {conversion.name} of {', '.join(shapes)}, and that "
                        "cannot be undone; merge in memory: lorafx.load, merge_and_unload, save_pretrained"
                    )
                found |= dict.fromkeys(shapes, conversion)
                self.names_converted |= names
        return found

    def _tried(self, conversion: Conversion) -> tuple[set[str], dict[str, tuple[int, ...]]]:
        """The names that a conversion makes, and the keys and shapes that its reverse gives: tried without numbers."""
        stored = {key: torch.empty(self.entries[key].shape, device="meta") for key in conversion.patterns}
        try:
            loaded = conversion.loaded(stored)
            if not self.changes.keys() & loaded.keys():
                return set(loaded), {}
            return set(loaded), {key: tuple(tensor.shape) for key, tensor in conversion.stored(loaded).items()}
        except Exception as error:  # whatever tensors of other shapes make transformers raise
            raise CheckpointError(f"{self.base.folder}: {conversion.name} cannot be made: {error}") from error

    def _convert(self, conversion: Conversion) -> dict[str, Tensor]:
        """The tensors of a conversion, by key, merged."""
        stored = {key: self.base.shard_of(key).tensor(key) for key in conversion.patterns}
        dtype = self._entry(next(iter(stored))).torch_dtype
        assert dtype is not None
        merged = {}
        for name, tensor in conversion.loaded(stored).items():
            read = functools.partial(_rows, tensor)
            change = self.changes.get(name, UNCHANGED)
            merged[name] = torch.cat(list(change.blocks(read, tuple(tensor.shape), dtype, name)))
        return conversion.stored(merged)

    def _of_conversion(self, key: str) -> Iterator[memoryview]:
        yield bytes_of(self.convert(self.conversions[key])[key])


def _piece(entry: Entry, change: Change, read: Callable[[int, int], Tensor], key: str) -> Piece:
    dtype = entry.torch_dtype
    assert dtype is not None
    return Piece(entry, lambda: map(bytes_of, change.blocks(read, entry.shape, dtype, key)))


def _rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    return tensor[start:stop]
