"""The merging of an adapted model: adapters into the base weights, and out again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter, remove
from ..adapters.storages import require_not_packed_since
from ..errors import AdapterError, ConfigError, MergeError, warn
from ..merging.dequantised import dense_layers, forget_quantisation, require_readable
from ..merging.ledger import Ledger
from ..progress import announced
from ..tree.lookup import find_tensor, tensor_at
from ..tree.memory import made_for_inference
from ..tree.wrappers import side_by_side
from .bounds import keep_within_bounds
from .part import Part, between_calls


class Merges(Part):
    """The part of an adapted model that merges and unmerges."""

    @between_calls
    def merge_adapter(
        self, adapter_names: Iterable[str] | None = None, safe_merge: bool = False, progressbar: bool = False
    ) -> None:
        """Write the merged weights (of LoRA, W + ΔW) in the place of the base's; `unmerge_adapter` undoes it exactly.

        Merges the active adapters, or those named. ΔW is computed in float32, or in float64 for a weight in float64,
        and W + ΔW is rounded once. `safe_merge` refuses a result that is not finite; `progressbar` shows one. Raises
        `MergeError`, with every weight as it was, when any site cannot be merged, and `AdapterError` for an unknown
        name, or one that replaces a tensor which another acting adapter replaces too.
        """
        state = self._lorafx
        names = state.acting if adapter_names is None else self._listed(adapter_names)
        adapters = self._in_order([name for name in names if name not in state.ledger.names])
        if not adapters:
            warn("these adapters are merged already" if names else "there is no active adapter to merge")
            return
        self._require_together((*state.ledger.names, *state.active, *names))
        self._merge(adapters, safe=safe_merge, progressbar=progressbar)

    def _merge(self, adapters: list[Adapter], **how: bool) -> None:
        """Merge adapters in this order."""
        if adapters and self._lorafx.replicas is not None:
            raise MergeError(
                f"{adapters[0].name!r} cannot be merged: `layer_replication` has layers share their weights, and each "
                "has an adapter of its own. Nothing was changed"
            )
        self._require_writable(adapters)
        for adapter in adapters:
            adapter.require_in_place(self.tree)
            require_not_packed_since(self.tree, adapter.selection)
        keep_within_bounds(self.tree, adapters)
        acting = (*self._lorafx.context.adapters, *adapters)
        replaced = {base: copy for adapter in acting for base, copy in adapter.replaced.items()}
        with contextlib.nullcontext() if how.get("progressbar") else announced("merging"):
            self._lorafx.ledger.merge(self.tree, adapters, replaced, **how)

    def _require_writable(self, adapters: Iterable[Adapter]) -> None:
        """Raise `MergeError` for weights that may only be written to under `torch.inference_mode()`."""
        weights = {site.weight for adapter in adapters for site in adapter.selection}
        found = [path for path in made_for_inference(self.tree) if path in weights]
        if found and not torch.is_inference_mode_enabled():
            raise MergeError(
                f"{found[0]} was made under `torch.inference_mode()`, and may only be written to there: merge, and "
                "unmerge, within it. Nothing was changed"
            )

    def _require_together(self, names: Iterable[str]) -> None:
        """Raise `AdapterError` for adapters of which two have their own copy of one base tensor: which would act?"""
        owners: dict[str, str] = {}
        for name in dict.fromkeys(names):
            for base in self._adapter(name).replaced:
                if base in owners:
                    raise AdapterError(
                        f"{owners[base]!r} and {name!r} cannot be active together, nor one be merged while the other "
                        f"is active: each has its own {base}"
                    )
                owners[base] = name

    def _require_unmerged(self, name: str, before: str) -> Adapter:
        """The adapter of this name; `AdapterError` if it is merged, or others are merged into its copies of tensors."""
        adapter, ledger = self._adapter(name), self._lorafx.ledger
        if name in ledger.names:
            raise AdapterError(f"{name!r} is merged; unmerge it before {before}")
        if held := [base for base, path in adapter.replaced.items() if path in ledger.entries]:
            raise AdapterError(
                f"{', '.join(map(repr, ledger.names))} merged into {held[0]} as {name!r} trains it; call "
                f"`unmerge_adapter()` before {before}"
            )
        return adapter

    def _without_merged(self, path: str) -> Tensor:
        """The tensor at a path, as it is without adapters that are merged into it."""
        ledger = self._lorafx.ledger
        return ledger.original(self.tree, path) if path in ledger.entries else tensor_at(self.tree, path)

    @contextlib.contextmanager
    def _unmerged(self) -> Iterator[None]:
        """Unmerge what is merged, and merge it again after the `with` block, with what acts then."""
        merged = self._lorafx.ledger.names
        self._lorafx.ledger.unmerge(self.tree)
        try:
            yield
        finally:
            if merged:
                self._merge([self._adapter(name) for name in merged])

    @contextlib.contextmanager
    def _alone(self, names: Iterable[str]) -> Iterator[None]:
        """Have no other adapters be active than these; on an error, all are as before.

        What is merged into the others' copies of base tensors moves to the base's own.
        """
        state, active = self._lorafx, self._lorafx.active
        rest = tuple(name for name in active if name in names)
        try:
            if any(self._adapter(name).replaced for name in active if name not in rest):
                with self._unmerged():
                    state.active = rest
            yield
        except BaseException:
            if state.active != active:
                with self._unmerged():
                    state.active = active
            raise

    def _in_order(self, names: list[str]) -> list[Adapter]:
        """These adapters in the order in which they act; `MergeError` if merging them would change the result.

        Merged adapters become the innermost. Additive ones may trade places at a site, others may not.
        """
        active, adapters = list(self._lorafx.active), [self._adapter(name) for name in names]
        order = {name: place for place, name in enumerate(active)}
        adapters.sort(key=lambda adapter: order.get(adapter.name, -1))
        for adapter in adapters:
            inside = active[: order.get(adapter.name, 0)]
            left = [self._adapter(name) for name in inside if name not in (*names, *self._lorafx.ledger.names)]
            for other in left:
                shared = set(adapter.sites_by_weight(self.tree)) & set(other.sites_by_weight(self.tree))
                if shared and not (adapter.kind.additive and other.kind.additive):
                    raise MergeError(
                        f"{adapter.name!r} acts on what {other.name!r} gives, so it cannot be merged without that one; "
                        f"merge both, or activate {adapter.name!r} first"
                    )
        return adapters

    @between_calls
    def unmerge_adapter(self) -> None:
        """Restore the base weights bit for bit. Raises `MergeError`, changing nothing, where that is impossible."""
        if not self._lorafx.ledger.names:
            warn("no adapter is merged; there is nothing to unmerge")
        self._lorafx.ledger.unmerge(self.tree)

    @between_calls
    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Iterable[str] | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        """Merge for good and return the base model object, a plain model again.

        Merges the active adapters, or those named, besides what is merged already; others are dropped. Biases and
        modules that the adapters trained as a whole replace the base's. Arguments and errors are those of
        `merge_adapter`.

        With a `dtype` the model is one of that dtype, without quantised layers: dense ones take their places, whose
        weights are what these stand for, with the adapters in them, computed in float64 and rounded once. Raises
        `MergeError` for a layer whose weight only the layer itself can read.
        """
        ledger = self._lorafx.ledger
        names = self._lorafx.active if adapter_names is None else self._listed(adapter_names)
        adapters = self._in_order([name for name in names if name not in ledger.names])
        chosen = dict.fromkeys((*ledger.names, *names))
        self._require_together(chosen)
        if dtype is not None:
            _require_float(dtype)
            require_readable(self.tree)
        with self._alone(chosen):
            if dtype is not None:
                adapters = self._of_dense_sites([self._adapter(name) for name in chosen])
            if adapters:
                self._merge(adapters, safe=safe_merge, progressbar=progressbar)
        for name in chosen:
            _keep_replaced(self.tree, self._adapter(name))
        self._lorafx.ledger = Ledger()
        if dtype is None:
            return self._given_back()
        layers = dict(dense_layers(self.tree, [self._adapter(name) for name in chosen], dtype))
        return _with_layers(self._given_back(), layers).to(dtype)

    def _of_dense_sites(self, adapters: list[Adapter]) -> list[Adapter]:
        """The parts of these adapters at sites that are not quantised, none of them merged any more."""
        self._lorafx.ledger.unmerge(self.tree)
        kept = [[site.weight for site in adapter.selection if not site.storage.whole] for adapter in adapters]
        return [adapter.restricted_to(sites, adapter.replaced) for adapter, sites in zip(adapters, kept)]

    @between_calls
    def unload(self) -> nn.Module:
        """Return the base model object as it was before any adapter. Raises `MergeError` as `unmerge_adapter` does.

        Weights that start values were taken out of (PiSSA, OLoRA, LoftQ) stay so, with a warning, as in PEFT. With
        `layer_replication` it is a model with these layers, which shares the weights of the base.
        """
        self._lorafx.ledger.unmerge(self.tree)
        self._warn_of_rests(self._lorafx.adapters.values())
        return self._given_back()

    def _warn_of_rests(self, adapters: Iterable[Adapter]) -> None:
        """Say that adapters leave a base without what their start values took out of it."""
        if names := [adapter.name for adapter in adapters if adapter.takes_from_base]:
            warn(
                f"{', '.join(map(repr, names))} took start values out of the base's weights, which stay without them: "
                "merge, or load the base again"
            )

    def _given_back(self) -> nn.Module:
        """The base model object without adapters, its modules training or not as they are here."""
        for module, own in side_by_side(self._lorafx.base, self.tree):
            module.training = own.training
        return self._leave()

    def _leave(self) -> nn.Module:
        """Drop the adapters and give the base its `requires_grad` flags back."""
        state = self._lorafx
        for adapter in state.adapters.values():
            remove(self.tree, adapter)
        state.adapters, state.active = {}, ()
        state.forget_programs()
        for path, flag in state.base_requires_grad.items():
            parameter = find_tensor(state.base, path)
            if parameter is not None and parameter.is_floating_point():
                parameter.requires_grad_(flag)
        return state.base


def _require_float(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ConfigError(f"dtype={dtype!r}: a model is merged into torch.float32, bfloat16, float16 or float64")


def _with_layers(base: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """A model with other layers at these paths, which are no quantised ones."""
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        if path:
            setattr(base.get_submodule(parent), name, layer)
    if layers:
        forget_quantisation(base)
    return layers.get("", base)


def _keep_replaced(tree: nn.Module, adapter: Adapter) -> None:
    """Replace base tensors by the adapter's own copies, in the base's dtype.

    A tied tensor of which not all modules have one copy is untied: the others keep the old one, each by itself, for
    transformers would save one of them alone, and tie the others to the new tensor when it loads that.
    """
    kept: dict[tuple[int, str], Tensor] = {}
    bases = [(tree.get_submodule(base.rpartition(".")[0]), base, path) for base, path in adapter.replaced.items()]
    for module, base, path in bases:
        last, old = base.rpartition(".")[2], tensor_at(tree, base)
        if (id(old), path) not in kept:
            copy = tensor_at(tree, path).detach().to(old.dtype, copy=True)
            kept[id(old), path] = nn.Parameter(copy) if last in module._parameters else copy
            mine = {id(owner) for owner, _, other in bases if other == path}
            _untie(old, [m._parameters for m in tree.modules() if id(m) not in mine])
        own = module._parameters if last in module._parameters else module._buffers
        own[last] = kept[id(old), path]  # type: ignore[assignment]


def _untie(old: Tensor, modules: list[dict[str, nn.Parameter | None]]) -> None:
    """Give each but the first of these modules that have a tensor a copy of its own."""
    ends = [(tensors, name) for tensors in modules for name, tensor in tensors.items() if tensor is old]
    for tensors, name in ends[1:]:
        tensors[name] = nn.Parameter(old.detach().clone(), old.requires_grad)
