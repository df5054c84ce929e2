"""Merge and unmerge: ΔW into the base weights and exactly out again.

    W' = round(W + Σ ΔW)        ΔW in float32 (float64 for a float64 weight), one rounding

Subtracting ΔW again would not give W back, so the ledger keeps for each merged weight what rounding took
(`residual.py`), with fingerprints of W and W' so that nothing is ever restored wrongly: a restore that would not
give W back bit for bit is refused before it writes. Merging another adapter starts from W again, so the result does
not depend on the order, and one residual a weight is kept however many adapters are merged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..adapters.adapter import Adapter
from ..adapters.selection import Site
from ..errors import MergeError
from ..ops.deferral import settle
from ..tree.lookup import find_tensor, first_name, tensor_at
from .residual import Residual, fingerprint, supports

# Copies of A and B are kept, so that unmerging survives changed adapters, where they are small beside the weight.
_SMALL = 1 / 16


@dataclass(frozen=True)
class Source:
    """One adapter's part in a merged weight: the values it had then, as copies if small, else as fingerprints."""

    adapter: Adapter
    site: Site
    shapes: dict[str, tuple[int, ...]]
    prints: dict[str, int]
    copies: dict[str, Tensor] | None

    @classmethod
    def of(cls, root: nn.Module, adapter: Adapter, site: Site) -> Source:
        """Record what `adapter` holds for `site` now."""
        tensors = {suffix: tensor.detach() for suffix, tensor in adapter.tensors_at(root, site).items()}
        small = sum(map(_bytes, tensors.values())) <= _SMALL * _bytes(root.get_parameter(site.weight))
        shapes = {suffix: tuple(tensor.shape) for suffix, tensor in tensors.items()}
        prints = {suffix: fingerprint(tensor) for suffix, tensor in tensors.items() if not tensor.is_meta}
        copies = {suffix: tensor.clone() for suffix, tensor in tensors.items()} if small else None
        return cls(adapter, site, shapes, prints, copies)

    @property
    def nbytes(self) -> int:
        """Bytes held in copies."""
        return sum(map(_bytes, (self.copies or {}).values()))

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

    def delta(self, root: nn.Module, device: torch.device) -> dict[str, Tensor]:
        """The change that the adapter made to the site's base parameters, by their name, in float64."""
        tensors = {suffix: tensor.to(device) for suffix, tensor in self.values(root).items()}
        return self.adapter.kind.delta(self.site, self.adapter.config, tensors)


@dataclass(frozen=True)
class Entry:
    """What is known of one merged base parameter."""

    sources: tuple[Source, ...]
    residual: Residual
    original: int
    merged: int
    dtype: torch.dtype
    device: torch.device


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
        """Write the base with all merged adapters and these into the weights: all of them or none.

        A base tensor that an acting adapter has replaced by a copy of its own, as `replaced` says, changes there.
        Raises `MergeError` for a site that cannot be merged, for a weight or adapter that was changed since an earlier
        merge, and, if `safe`, for a result that is not finite.
        """
        earlier = {(s.adapter.name, s.site.name): s for entry in self.entries.values() for s in entry.sources}
        everyone = (*self.adapters, *adapters)
        copies = {id(tensor_at(root, base)): copy for base, copy in replaced.items()}
        names = {id(parameter): name for name, parameter in root.named_parameters()} | copies
        targets: dict[str, tuple[Source, ...]] = {}
        for adapter in everyone:
            for site in adapter.selection:
                source = earlier.get((adapter.name, site.name)) or Source.of(root, adapter, site)
                for parameter in _changed_parameters(root, source):
                    path = names[id(parameter)]
                    targets[path] = (*targets.get(path, ()), source)
        touched = {path: t for path, t in targets.items() if any(s.adapter in adapters for s in t)}
        self._move(root, touched, safe, progressbar)
        self.adapters = everyone

    def unmerge(self, root: nn.Module) -> None:
        """Restore every base parameter bit for bit: all of them or none; `MergeError` where that is impossible."""
        for path, entry in self.entries.items():
            _check_untouched(root, path, entry)
        self._move(root, dict.fromkeys(self.entries, ()), safe=False)
        self.adapters = ()

    def original(self, root: nn.Module, path: str) -> Tensor:
        """The parameter at `path`, under any of its names, as it is without adapters."""
        path = first_name(root, path)
        return _original(root, path, self.entries.get(path))

    def sizes(self, root: nn.Module) -> dict[str, tuple[int, int]]:
        """Extra bytes kept for each merged parameter, and its own bytes."""
        return {
            path: (
                entry.residual.nbytes + _copied(root.get_parameter(path), entry.sources),
                _bytes(root.get_parameter(path)),
            )
            for path, entry in self.entries.items()
        }

    def _move(
        self, root: nn.Module, targets: Mapping[str, tuple[Source, ...]], safe: bool, progressbar: bool = False
    ) -> None:
        """Bring each parameter to its base plus these sources; on any failure, all back to what they were."""
        before = dict(self.entries)
        try:
            for path, sources in tqdm(targets.items(), "merging", disable=not progressbar):
                self._set(path, _transition(root, path, self.entries.get(path), sources, safe))
        except BaseException:
            for path in targets:
                now, then = self.entries.get(path), before.get(path)
                if now is not then:
                    self._set(path, _transition(root, path, now, then.sources if then else (), safe=False))
            raise

    def _set(self, path: str, entry: Entry | None) -> None:
        if entry is None:
            self.entries.pop(path, None)
        else:
            self.entries[path] = entry


def _transition(
    root: nn.Module, path: str, entry: Entry | None, sources: tuple[Source, ...], safe: bool
) -> Entry | None:
    """Replace what is merged into one parameter; the write comes last, once everything is known."""
    weight = root.get_parameter(path)
    original = _original(root, path, entry).to(weight.device)
    if not sources:
        _write(weight, original)
        return None
    if weight.is_meta:
        raise MergeError(f"{path} is on the meta device and has no values to merge into")
    change = _total(root, sources, weight)
    merged = (original.to(change.dtype) + change).to(weight.dtype)
    if safe and not merged.isfinite().all():
        raise MergeError(f"merging would leave values in {path} that are not finite; no weight was changed")
    residual = Residual.of(original, _guess(merged, change))
    if residual.nbytes + _copied(weight, sources) >= _bytes(original):  # then a plain copy is cheaper, and stands alone
        residual, sources = Residual.copy(original), tuple(replace(source, copies=None) for source in sources)
    new = Entry(sources, residual, fingerprint(original), fingerprint(merged), weight.dtype, weight.device)
    _write(weight, merged)
    return new


def _original(root: nn.Module, path: str, entry: Entry | None) -> Tensor:
    weight = root.get_parameter(path).detach()
    if entry is None:
        return weight
    _check_untouched(root, path, entry)
    if entry.residual.whole is not None:
        return entry.residual.whole.reshape(weight.shape)
    there = weight.to(entry.device)
    restored = entry.residual.restore(_guess(there, _total(root, entry.sources, there)))
    if fingerprint(restored) != entry.original:
        raise MergeError(
            f"{path} could not be restored exactly: its ΔW comes out differently now than when it was merged on "
            f"{entry.device}; nothing was changed"
        )
    return restored


def _check_untouched(root: nn.Module, path: str, entry: Entry) -> None:
    weight = root.get_parameter(path).detach()
    if weight.is_meta:
        raise MergeError(f"{path} was merged on {entry.device} and has been moved to meta, so its values are gone")
    if weight.dtype != entry.dtype:
        raise MergeError(
            f"{path} was merged in {entry.dtype} and is {weight.dtype} now, so its original is out of reach; unmerge "
            f"before converting a model (`.to(dtype)`), or convert it back and load the base again"
        )
    if fingerprint(weight) != entry.merged:
        raise MergeError(f"{path} has been changed since the merge, so its original cannot be restored")
    for source in entry.sources if entry.residual.whole is None else ():
        source.values(root)


def _changed_parameters(root: nn.Module, source: Source) -> Iterator[nn.Parameter]:
    """The base parameters that a source changes; `MergeError` if one of them does not exist."""
    shapes = {s: torch.empty(shape, device="meta") for s, shape in source.shapes.items()}
    for parameter in source.adapter.kind.delta(source.site, source.adapter.config, shapes):
        path = source.site.weight if parameter == "weight" else source.site.bias
        if find_tensor(root, path) is None:
            raise MergeError(f"adapter {source.adapter.name!r} changes {path}, which the base does not have")
        if not supports(root.get_parameter(path).dtype):
            raise MergeError(f"{path} is {root.get_parameter(path).dtype}, which cannot be merged into exactly")
        yield root.get_parameter(path)


def _total(root: nn.Module, sources: Sequence[Source], weight: Tensor) -> Tensor:
    """Σ ΔW of the sources for one parameter, rounded once to the dtype that the sum with W is taken in."""
    total = sum(source.delta(root, weight.device)[_role(weight)] for source in sources)
    assert isinstance(total, Tensor)
    return total.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)


def _role(parameter: Tensor) -> str:
    """Which of a site's parameters this is. Its name does not say: it may be one that somebody else has given it."""
    return "weight" if parameter.ndim > 1 else "bias"


def _copied(parameter: Tensor, sources: Sequence[Source]) -> int:
    """Bytes of the factors' copies, counted with the weight they were made for and not again with its bias."""
    return sum(source.nbytes for source in sources if _role(parameter) == "weight")


def _guess(merged: Tensor, change: Tensor) -> Tensor:
    return (merged.to(change.dtype) - change).to(merged.dtype)


def _write(weight: Tensor, value: Tensor) -> None:
    settle(weight)  # logits of before
    with torch.no_grad():
        weight.copy_(value)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
