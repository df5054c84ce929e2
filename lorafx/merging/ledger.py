"""The ledger: which adapters are merged, and how each base weight comes back, exactly.

Merging another adapter starts from W again, so that there is one residual a weight, however many adapters are merged.
A merge writes into all weights or, if it fails, into none; so does an unmerge.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from tqdm import tqdm

from ..adapters.adapter import Adapter
from ..adapters.site import Site
from ..adapters.storages import DENSE
from ..adapters.tying import read_at
from ..errors import MergeError, warn
from ..tree.lookup import find_tensor, first_name, tensor_at
from ..tree.memory import Shared
from .batch import batches, merge, original, unmerge
from .entry import Entry, Target
from .residual import supports
from .scratch import Scratch
from .source import Source
from .steps import Sources


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
        places = read_at(root, {id(parameter): name for name, parameter in root.named_parameters()}, replaced)
        targets: dict[Target, Sources] = {}
        for adapter in everyone:
            for site in adapter.selection:
                source = earlier.get((adapter.name, site.name)) or Source.of(root, adapter, site)
                for target in targets_of(root, adapter, site, places):
                    targets[target] = (*targets.get(target, ()), source)
        touched = {target: t for target, t in targets.items() if any(s.adapter in adapters for s in t)}
        _require_own_memory(root, touched)
        self._move(root, touched, safe, progressbar)
        self.adapters = everyone
        self._warn_of_loss([target.path for target in touched if target.storage.lossy])

    def _warn_of_loss(self, paths: Sequence[str]) -> None:
        """Say once what merging into quantised weights has lost, and of which most."""
        if not paths:
            return
        worst = max((self.entries[path] for path in paths), key=lambda entry: entry.lost)
        others = f", as {len(paths) - 1} other weights are quantised" if len(paths) > 1 else ""
        warn(
            f"{worst.target.path} is stored as {worst.target.storage}{others}: merging loses what that cannot hold, "
            f"{worst.lost:.1%} of this one and of none more (by the Frobenius norm; `report()` has all). "
            "`merge_and_unload(dtype=…)` and `lorafx.merge` round once instead"
        )

    def unmerge(self, root: nn.Module) -> None:
        """Restore every base parameter bit for bit: all of them or none; `MergeError` where that is impossible."""
        for entry in self.entries.values():
            entry.check(root)
        self._move(root, {entry.target: () for entry in self.entries.values()}, safe=False)
        self.adapters = ()

    def original(self, root: nn.Module, path: str) -> Tensor:
        """The parameter at `path`, which may be any of its names, as it is without adapters."""
        path = first_name(root, path)
        entry = self.entries.get(path)
        return (original(root, entry) if entry else Target(path).stored(root))["weight"]

    @property
    def lost(self) -> dict[str, float]:
        """The share of each merged weight that its storage cannot hold, of those that are not dense."""
        return {path: entry.lost for path, entry in self.entries.items() if entry.target.storage.lossy}

    def sizes(self, root: nn.Module) -> dict[str, tuple[int, int]]:
        """Extra bytes kept for each merged parameter, and its own bytes."""
        return {
            path: (entry.nbytes, sum(tensor.nbytes for tensor in entry.target.stored(root).values()))
            for path, entry in self.entries.items()
        }

    def _move(self, root: nn.Module, targets: Mapping[Target, Sources], safe: bool, progressbar: bool = False) -> None:
        """Write each parameter with these sources merged into its original; on any failure, put all back."""
        before, scratch = dict(self.entries), Scratch()
        try:
            self._set(root, targets, scratch, safe, progressbar)
        except BaseException:
            then = {target: before.get(target.path) for target in targets}
            changed = {target: entry for target, entry in then.items() if self._is_changed(root, target, entry)}
            self._set(root, {target: entry.sources if entry else () for target, entry in changed.items()}, scratch)
            raise

    def _is_changed(self, root: nn.Module, target: Target, before: Entry | None) -> bool:
        """Whether a parameter is another than before; an interrupt may come between its restore and the note of it."""
        return self.entries.get(target.path) is not before or (before is not None and before.is_restored(root))

    def _set(
        self,
        root: nn.Module,
        targets: Mapping[Target, Sources],
        scratch: Scratch,
        safe: bool = False,
        progressbar: bool = False,
    ) -> None:
        """Set what is merged into each parameter."""
        held = [self.entries[target.path] for target in targets if target.path in self.entries]
        for batch in batches(root, held):
            unmerge(root, batch, scratch)
            for entry in batch:
                del self.entries[entry.target.path]
        with tqdm(total=len(targets), desc="merging", disable=not progressbar) as bar:
            for batch in batches(root, [Entry.of(root, target, s) for target, s in targets.items() if s]):
                self.entries |= {entry.target.path: entry for entry in batch}  # before an interrupt can come in between
                merge(root, batch, scratch, safe=safe)
                bar.update(len(batch))


def targets_of(root: nn.Module, adapter: Adapter, site: Site, places: Mapping[int, Sequence[str]]) -> Iterator[Target]:
    """The base parameters that an adapter changes at a site, at the `places` where each is read, by its identity.

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
        for place in places.get(id(parameter), (path,)):
            yield Target(place, role, storage)


def _require_own_memory(root: nn.Module, targets: Iterable[Target]) -> None:
    """Raise `MergeError` where a write into one of these parameters would change another number than its own."""
    shared = Shared(root)
    for target in targets:
        if objection := shared.objection(target.path, tensor_at(root, target.path)):
            raise MergeError(f"cannot merge into {objection}. Nothing was changed")


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
