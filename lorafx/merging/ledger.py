"""Merge and unmerge: adapters into the base weights and exactly out again.

    W' = round(merged(W))        in float64, one rounding; of LoRA, merged(W) = W + Σ ΔW

Subtracting ΔW again would not give W back, so the ledger keeps for each merged weight what rounding took
(`residual.py`), or a copy if that is smaller or the kind has no inverse. It also keeps fingerprints of W and W': a
restore that would not give W back bit for bit is refused before anything is written. Merging another adapter starts
from W again, so that there is one residual a weight, however many adapters are merged.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..adapters.adapter import Adapter
from ..adapters.site import Site
from ..adapters.storages import DENSE, Storage
from ..errors import MergeError
from ..ops.deferral import settle
from ..tree.lookup import find_tensor, first_name, tensor_at
from .residual import Residual, fingerprint, supports
from .source import Source, bytes_of


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
        self.storage.written(root.get_submodule(self.path.rpartition(".")[0]))


@dataclass(frozen=True)
class Entry:
    """What is known of one merged base parameter: what was merged into it, and how to restore it.

    `residual` restores it from its present value; without one, `copies` are the tensors that held it. `original` and
    `merged` are fingerprints of the tensors that hold it, before the merge and after.
    """

    target: Target
    sources: tuple[Source, ...]
    residual: Residual | None
    copies: dict[str, Tensor] | None
    original: dict[str, int]
    merged: dict[str, int]
    dtype: torch.dtype
    device: torch.device

    @property
    def nbytes(self) -> int:
        """Bytes kept for this parameter; copies of adapters' tensors count with the weight, not again with the bias."""
        copied = sum(source.nbytes for source in self.sources) if self.target.role == "weight" else 0
        kept = self.residual.nbytes if self.residual else sum(map(bytes_of, (self.copies or {}).values()))
        return kept + copied


@dataclass
class Ledger:
    """The merged base parameters by path, and the adapters merged into them, in order."""

    adapters: tuple[Adapter, ...] = ()
    entries: dict[str, Entry] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the merged adapters."""
        return tuple(adapter.name for adapter in self.adapters)

    def merge(
        self,
        root: nn.Module,
        adapters: Sequence[Adapter],
        replaced: Mapping[str, str],
        *,
        safe: bool = False,
        progressbar: bool = False,
    ) -> None:
        """Merge these adapters on top of those that are merged already: into all their weights, or none if it fails.

        `replaced` maps base tensors to the copies that acting adapters train instead, which are merged into in their
        place. Raises `MergeError` for a site that cannot be merged, for a weight or adapter that was changed since an
        earlier merge, and, if `safe`, for a result that is not finite.
        """
        earlier = {(s.adapter.name, s.site.name): s for entry in self.entries.values() for s in entry.sources}
        everyone = (*self.adapters, *adapters)
        copies = {id(find_tensor(root, base)): copy for base, copy in replaced.items()}
        names = {id(parameter): name for name, parameter in root.named_parameters()} | copies
        targets: dict[Target, tuple[Source, ...]] = {}
        for adapter in everyone:
            for site in adapter.selection:
                source = earlier.get((adapter.name, site.name)) or Source.of(root, adapter, site)
                for target in targets_of(root, adapter, site, names):
                    targets[target] = (*targets.get(target, ()), source)
        touched = {target: t for target, t in targets.items() if any(s.adapter in adapters for s in t)}
        self._move(root, touched, safe, progressbar)
        self.adapters = everyone

    def unmerge(self, root: nn.Module) -> None:
        """Restore every base parameter bit for bit: all of them or none; `MergeError` where that is impossible."""
        for entry in self.entries.values():
            _check_untouched(root, entry)
        self._move(root, {entry.target: () for entry in self.entries.values()}, safe=False)
        self.adapters = ()

    def original(self, root: nn.Module, path: str) -> Tensor:
        """The parameter at `path`, which may be any of its names, as it is without adapters."""
        path = first_name(root, path)
        entry = self.entries.get(path)
        return _original(root, entry.target if entry else Target(path), entry)["weight"]

    def sizes(self, root: nn.Module) -> dict[str, tuple[int, int]]:
        """Extra bytes kept for each merged parameter, and its own bytes."""
        return {
            path: (entry.nbytes, sum(map(bytes_of, entry.target.stored(root).values())))
            for path, entry in self.entries.items()
        }

    def _move(
        self, root: nn.Module, targets: Mapping[Target, tuple[Source, ...]], safe: bool, progressbar: bool = False
    ) -> None:
        """Write each parameter with these sources merged into its original; on any failure, put all back."""
        before = dict(self.entries)
        try:
            for target, sources in tqdm(targets.items(), "merging", disable=not progressbar):
                self._set(target, _transition(root, target, self.entries.get(target.path), sources, safe))
        except BaseException:
            for target in targets:
                now, then = self.entries.get(target.path), before.get(target.path)
                if now is not then:
                    sources = then.sources if then else ()
                    self._set(target, _transition(root, target, now, sources, safe=False))
            raise

    def _set(self, target: Target, entry: Entry | None) -> None:
        if entry is None:
            self.entries.pop(target.path, None)
        else:
            self.entries[target.path] = entry


def targets_of(root: nn.Module, adapter: Adapter, site: Site, names: Mapping[int, str]) -> Iterator[Target]:
    """The base parameters that an adapter changes at a site, under their `names`, which are by the parameters' ids.

    Raises `MergeError` if one of them does not exist, or if no change of them is what the adapter does.
    """
    _require_no_other_bias(root, adapter, site)
    for role in adapter.kind.changes(site, adapter.config):
        path = site.weight if role == "weight" else site.bias
        if find_tensor(root, path) is None:
            raise MergeError(f"adapter {adapter.name!r} changes {path}, which the base does not have")
        storage = site.storage if role == "weight" else DENSE
        if not storage.readable:
            raise MergeError(
                f"{site.name} is stored as {storage}: only the module itself can read such a weight, so nothing can be "
                "merged into it; merge into the original checkpoint instead (`lorafx.merge`)"
            )
        parameter = tensor_at(root, path)
        if storage == DENSE and not supports(parameter.dtype):
            raise MergeError(f"{path} is {parameter.dtype}, which cannot be merged into exactly")
        yield Target(names.get(id(parameter), path), role, storage)


def _require_no_other_bias(root: nn.Module, adapter: Adapter, site: Site) -> None:
    """Raise `MergeError` where the weight has other modules with biases, which the adapter may act on too."""
    own = find_tensor(root, site.bias)
    for twin in site.tied if not adapter.kind.additive else ():
        bias = find_tensor(root, f"{twin}.{site.reading.bias}")
        if bias is not None and bias is not own:
            raise MergeError(
                f"{site.name} shares its weight with {twin}, which has a bias of its own: adapter "
                f"{adapter.name!r} does more than change the weight there, and cannot be merged"
            )


def _transition(
    root: nn.Module, target: Target, entry: Entry | None, sources: tuple[Source, ...], safe: bool
) -> Entry | None:
    """Set what is merged into one parameter; returns its new entry, None for no sources. The write comes last."""
    weight = tensor_at(root, target.path)
    original = {name: tensor.to(weight.device) for name, tensor in _original(root, target, entry).items()}
    if not sources:
        target.write(root, original)
        return None
    if weight.is_meta:
        raise MergeError(f"{target.path} is on the meta device and has no values to merge into")
    merged = _merged(root, target, original, sources)
    if safe and not all(tensor.isfinite().all() for tensor in merged.values()):
        raise MergeError(f"merging would leave values in {target.path} that are not finite; no weight was changed")
    before, after = (_prints(tensors) for tensors in (original, original | merged))
    entry = Entry(target, sources, None, None, before, after, weight.dtype, weight.device)
    entry = _remembering(root, entry, original, merged)
    target.write(root, merged)
    return entry


def _merged(
    root: nn.Module, target: Target, original: Mapping[str, Tensor], sources: Sequence[Source]
) -> dict[str, Tensor]:
    """The tensors that hold a parameter with these adapters in it."""
    dense = target.storage.dense(original).double()
    for source in sources:
        changed = source.merged(root, target.role, dense)
        if changed.shape != dense.shape:
            raise MergeError(f"{target.path}: adapter {source.adapter.name!r} would make {tuple(changed.shape)} of it")
        dense = changed
    if target.storage.lossy:
        warnings.warn(f"{target.path} is stored as {target.storage}: merging into it loses what that cannot hold")
    try:
        return target.storage.packed(dense, original)
    except MergeError as error:
        raise MergeError(f"{target.path}: {error}") from error


def _remembering(root: nn.Module, entry: Entry, original: Mapping[str, Tensor], merged: Mapping[str, Tensor]) -> Entry:
    """The entry with a residual, if the kinds have inverses, or with copies, whichever takes less memory.

    With copies of the weight, those of the adapters' tensors are not needed.
    """
    if entry.target.storage == DENSE:
        guess = _guess(root, entry.target, merged["weight"], entry.sources)
        if guess is not None:
            new = replace(entry, residual=Residual.of(original["weight"], guess))
            if new.nbytes < bytes_of(original["weight"]):
                return new
    alone = tuple(replace(source, copies=None) for source in entry.sources)
    return replace(entry, sources=alone, copies={name: tensor.clone() for name, tensor in original.items()})


def _guess(root: nn.Module, target: Target, merged: Tensor, sources: Sequence[Source]) -> Tensor | None:
    """What the parameter was before these adapters, up to rounding; None if one of them has no inverse."""
    dense: Tensor | None = merged.double()
    for source in reversed(sources):
        dense = None if dense is None else source.unmerged(root, target.role, dense)
    return None if dense is None else dense.to(merged.dtype)


def _original(root: nn.Module, target: Target, entry: Entry | None) -> dict[str, Tensor]:
    """The tensors that hold a parameter as they are without adapters."""
    if entry is None:
        return target.stored(root)
    _check_untouched(root, entry)
    if entry.residual is None:
        return dict(entry.copies or {})
    there = target.stored(root)["weight"].to(entry.device)
    guess = _guess(root, target, there, entry.sources)
    assert guess is not None, "what has a residual has an inverse"
    restored = entry.residual.restore(guess)
    if fingerprint(restored) != entry.original["weight"]:
        raise MergeError(
            f"{target.path} could not be restored exactly: its ΔW comes out differently now than when it was merged on "
            f"{entry.device}; nothing was changed"
        )
    return {"weight": restored}


def _prints(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: fingerprint(tensor) for name, tensor in tensors.items()}


def _check_untouched(root: nn.Module, entry: Entry) -> None:
    path = entry.target.path
    weight = tensor_at(root, path).detach()
    if weight.is_meta:
        raise MergeError(f"{path} was merged on {entry.device} and has been moved to meta, so its values are gone")
    if weight.dtype != entry.dtype:
        raise MergeError(
            f"{path} was merged in {entry.dtype} and is {weight.dtype} now, so its original is out of reach; unmerge "
            f"before converting a model (`.to(dtype)`), or convert it back and load the base again"
        )
    if _prints(entry.target.stored(root)) != entry.merged:
        raise MergeError(f"{path} has been changed since the merge, so its original cannot be restored")
    for source in entry.sources if entry.residual else ():
        source.values(root)
