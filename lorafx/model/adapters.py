"""The adapters of an adapted model: added, loaded, made active, switched off for a while, deleted."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..adapters.adapter import TRAINED_BIAS, Adapter, remove
from ..adapters.building import build
from ..adapters.config import AdapterConfig, require
from ..adapters.expert_names import with_experts
from ..adapters.kinds import Spec, config_of
from ..adapters.notes import forget
from ..adapters.planning import plan
from ..adapters.slots import put, used
from ..adapters.start_values import Rests
from ..adapters.storages import keep_own_layers
from ..errors import AdapterError, ConfigError, warn
from ..files import checkpoint
from ..merging.ledger import Target
from ..tree.attached import Held, own_modules, set_trainable
from ..tree.lookup import copy_into, module_at, tensor_at
from ..tree.memory import Shared
from ..tree.mirror import mirrored
from .calls import serve_parts
from .part import between_calls
from .scales import Scales, number
from .state import Found
from .trainers import require_same


class LoadResult(NamedTuple):
    """What `load_adapter` returns, by PEFT's names: keys that the file lacks, and keys that no site takes."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class Adapters(Scales):
    """The part of an adapted model that has its adapters come, act and go."""

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: AdapterConfig | Mapping[str, Any] | Any,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool | None = None,
        *,
        random_state: int | None = None,
    ) -> None:
        """Add a new adapter; `set_adapter` makes it active.

        The options are those of `compile`; without `autocast_adapter_dtype` it is as when this model was made.
        Raises `AdapterError` for a name that is taken, `ConfigError` or `SelectionError` for a config that is unfit.
        """
        root = mirrored(self.tree)
        adapter = plan(root, adapter_name, with_experts(root, config_of(peft_config)))
        rests = self._install(adapter, autocast_adapter_dtype, random_state=random_state, on_meta=low_cpu_mem_usage)
        self._leave_rests(rests)

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool | None = None,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        ignore_mismatched_sizes: bool = False,
        *,
        weights_only: bool = False,
        **hub: Any,
    ) -> LoadResult:
        """Add an adapter from a folder or Hub id; `set_adapter` makes it active. Errors are those of `lorafx.load`.

        Positions and names are PEFT's. `torch_device` and `low_cpu_mem_usage` change nothing: values go from the file
        to where the base's weights are. `ConfigError` for `ephemeral_gpu_offload`, `key_mapping` and
        `ignore_mismatched_sizes`. What is returned has no keys: a missing or unexpected one is a `CheckpointError`.

        An adapter of that name that is there already takes the file's values, in place: its parameters stay the same
        objects, as a trainer that resumes needs. Raises `AdapterError` if it differs in more than values, or is merged.
        """
        require(not ephemeral_gpu_offload, "ephemeral_gpu_offload", ephemeral_gpu_offload, "False")
        require(not key_mapping, "key_mapping", key_mapping, "None")
        require(not ignore_mismatched_sizes, "ignore_mismatched_sizes", ignore_mismatched_sizes, "False")
        found = checkpoint.read(model_id, weights_only=weights_only, **hub)
        adapter, values, embeddings = checkpoint.fit(mirrored(self.tree), adapter_name, found, is_trainable)
        if adapter_name in self._lorafx.adapters:
            known = used(self._require_unmerged(adapter_name, "loading other values into it"))
            require_same(known, adapter)
            put(self.tree, known, values)
            self._take_config(adapter)
        else:
            self._leave_rests(self._install(adapter, autocast_adapter_dtype, values=values))
            if is_trainable:
                self.set_requires_grad(adapter_name)
        copy_into(self.tree, embeddings)
        if not is_trainable and any(module.training for module in own_modules(self.tree)):
            self.tree.eval()  # which visits the modules of all adapters
        return LoadResult([], [])

    def _take_config(self, found: Adapter) -> None:
        """Have the adapter of this name say of its values what one says whose values it has taken."""
        known = self._lorafx.adapters[found.name]
        said = {name: getattr(found.config, name) for name in known.kind.about_values}
        self._lorafx.adapters[found.name] = replace(known, config=known.config.replace(**said))

    def _install(self, adapter: Adapter, autocast_adapter_dtype: bool | None = None, **how: Any) -> Rests:
        """Put an adapter on the model; returns what is to be left of the base's weights, see `build`."""
        state = self._lorafx
        self._require_free(adapter.name)
        if state.ledger.names and adapter.takes_from_base:
            raise AdapterError(
                f"{', '.join(map(repr, state.ledger.names))} merged into the weights that {adapter.name!r} takes its "
                "start values from; call `unmerge_adapter()` first"
            )
        self._require_company(adapter)
        self._require_own_memory(adapter)
        self._warn_of_biases(adapter)
        wide = state.autocast_adapter_dtype if autocast_adapter_dtype is None else autocast_adapter_dtype
        rests = build(self.tree, adapter, autocast_adapter_dtype=wide, **how)
        state.adapters[adapter.name] = adapter
        if how.get("values"):
            state.given.add(adapter.name)
        keep_own_layers(self.tree, [site.module for site in adapter.selection])
        serve_parts(self.tree, adapter)
        self._freeze([adapter.name])  # until it is active
        return rests

    def _require_company(self, adapter: Adapter) -> None:
        """Raise `AdapterError` where what an adapter leaves of the base is not what another is meant for."""
        for other in self._lorafx.adapters.values():
            pair = (other, adapter) if other.kind.only_beside_its_own else (adapter, other)
            alone, beside = pair
            if alone.kind.only_beside_its_own and _taken(alone) != _taken(beside):
                raise AdapterError(
                    f"{alone.name!r} changes the base's weights for good ({type(alone.kind).__name__}), so that "
                    f"{beside.name!r}, which does not take the same from the same weights, would mean something else: "
                    f"delete {other.name!r} and load the base again"
                )

    def _require_own_memory(self, adapter: Adapter) -> None:
        """Raise `AdapterError` where taking start values out of a base weight would take them out of another, too."""
        if not adapter.takes_from_base:
            return
        shared = Shared(self.tree)
        for site in adapter.selection:
            if objection := shared.objection(site.weight, tensor_at(self.tree, site.weight)):
                raise AdapterError(f"cannot take start values out of {objection}")

    def _require_free(self, name: str) -> None:
        if name in self._lorafx.adapters:
            raise AdapterError(f"there is an adapter {name!r} already; delete it or choose another name")

    @torch.no_grad()
    def _leave_rests(self, rests: Rests) -> None:
        """Leave base weights with what start values were not taken out of."""
        for site, tensors in rests.items():
            Target(site.weight, storage=site.storage).write(self.tree, tensors)
            forget(tensor_at(self.tree, site.weight))

    def _warn_of_biases(self, adapter: Adapter) -> None:
        """Say that an adapter that trains biases cannot be active beside another that trains the same."""
        for other in self._lorafx.adapters.values():
            both = [base for base, path in adapter.replaced.items() if base in other.replaced and TRAINED_BIAS in path]
            if both:
                warn(
                    f"{adapter.name!r} and {other.name!r} each train their own {both[0]} (`bias`): they cannot be "
                    "active together, and PEFT does not load both"
                )

    @between_calls
    def set_adapter(
        self, adapter_name: str | Sequence[str] | Mapping[str, float], inference_mode: bool = False
    ) -> None:
        """Make these adapters, and no others, active and trainable, as in PEFT also those loaded for inference.

        The first acts innermost. Given as `{"a": 0.7, "b": -0.3}`, each also gets that scale, as by `set_scale`, which
        is what weighs them: once these are tensors, other weights capture and compile nothing. With `inference_mode`
        none trains until the active ones change. A merged model is unmerged first, with a warning.

        Raises, with the model as it was, `AdapterError` for an unknown name, for adapters that both replace one tensor
        (a bias, a saved module) and, given weights, for a kind without scaling; `ConfigError` for what is no weight.
        """
        if not isinstance(inference_mode, bool):
            raise ConfigError(f"inference_mode={inference_mode!r} is no bool; weights go with the names: {{'a': 0.7}}")
        names = self._listed(adapter_name)
        self._require_together(names)
        weights = {n: number(w) for n, w in adapter_name.items()} if isinstance(adapter_name, Mapping) else {}
        for name in weights:
            self._require_scalable(name)
        if self._lorafx.ledger.names:
            warn("the model was merged; it is unmerged before the active adapters change")
            self._lorafx.ledger.unmerge(self.tree)
        for name, weight in weights.items():
            self.set_scale(name, weight)
        self._lorafx.active = names
        if not inference_mode:
            self._let_train(names)
        self._set_trainable()
        if inference_mode:
            self._freeze(names)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let adapters train or not, active ones or others, until the active ones change. `AdapterError` if unknown."""
        names = self._listed(adapter_names)
        for held in self._held(names):
            held.set_trainable(requires_grad)
        self._lorafx.trained.update(names)

    def _let_train(self, names: Sequence[str]) -> None:
        """Have these train from now on where they are active, also those that were loaded for inference."""
        for name in names:
            adapter = self._lorafx.adapters[name]
            if adapter.config.inference_mode:
                self._lorafx.adapters[name] = replace(adapter, config=adapter.config.replace(inference_mode=False))

    def _freeze(self, names: Collection[str]) -> None:
        for held in self._held(names):
            held.set_trainable(False)

    def _held(self, names: Collection[str]) -> list[Held]:
        """What holds the tensors of these adapters, found anew where a module on the way is another."""
        kept, wanted = self._lorafx.held, {name: self._adapter(name).ways for name in names}
        same = [kept[name] for name, ways in wanted.items() if name in kept and kept[name].ways is ways]
        in_place = {each for each in {held.parents for held in same} if each.are_bare and each.are_in_place}
        for name, ways in wanted.items():
            if name not in kept or kept[name].ways is not ways or kept[name].parents not in in_place:
                kept[name] = Held(self.tree, ways, in_place)
                in_place.add(kept[name].parents)
        return [kept[name] for name in wanted]

    @between_calls
    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Remove an adapter, or several, with their tensors.

        If none is active then, the first that is merged or left becomes active. Raises `AdapterError`, with all of them
        left, for an unknown name, or while one is merged.
        """
        names, state = self._listed(adapter_name), self._lorafx
        adapters = [self._require_unmerged(name, "deleting it") for name in names]
        self._warn_of_rests(adapters)
        for adapter in adapters:
            remove(self.tree, adapter)
            del state.adapters[adapter.name]
            state.allocators.pop(adapter.name, None)
            state.given.discard(adapter.name)
            state.first.pop(adapter.name, None)
            state.held.pop(adapter.name, None)
            for dispatcher in state.dispatchers:
                dispatcher.forget(adapter.name)
        if {*names} & {*state.active}:
            rest = tuple(name for name in state.active if name not in names)
            state.active = rest or (state.ledger.names or tuple(state.adapters))[:1]
            self._set_trainable()

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run as the base model within a `with` block: no adapter acts, and merged ones are unmerged meanwhile.

        Adapters may be added, deleted or made active meanwhile; they act, and train, after the block. Of several
        blocks, as threads have them, the last to end has all be as it was before the first.
        """
        state, block = self._lorafx, object()
        names = self._trained()
        tensors = (tensor for name in names for tensor in self._adapter(name).ways.tensors(self.tree))
        trained = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
        found = Found(state.disabled, state.active, state.ledger.names, names, trained)
        self.disable_adapter_layers()
        state.blocks[block] = found
        try:
            yield
        finally:
            later = [*state.blocks][[*state.blocks].index(block) + 1 :]
            found = state.blocks.pop(block)
            if later:
                state.blocks[later[0]] = found  # which ends later, and goes on from what this one found
            else:
                self._put_back(found)

    def _put_back(self, found: Found) -> None:
        """Have the adapters act and train as they did, but for what was added, deleted or made active since."""
        state = self._lorafx
        state.disabled = found.disabled
        if state.active != found.active:
            return self._set_trainable()
        self._merge([state.adapters[n] for n in found.merged if n in state.adapters and n not in state.ledger.names])
        set_trainable(found.trained, True)
        state.trained = found.names

    @between_calls
    def disable_adapter_layers(self) -> None:
        """Run as the base model from now on: merged adapters are unmerged, and none acts or trains."""
        self._lorafx.ledger.unmerge(self.tree)
        self._lorafx.disabled = True
        self._set_trainable()

    @between_calls
    def enable_adapter_layers(self) -> None:
        """Have the active adapters act again."""
        with self._unmerged():  # what was merged since belongs into their copies of base tensors
            self._lorafx.disabled = False
        self._set_trainable()

    def _set_trainable(self) -> None:
        """Let the active adapters train, and no others. What the user trains of the base besides stays as it is."""
        state = self._lorafx
        names = list(self._trained().union(state.acting))
        for name, held in zip(names, self._held(names)):
            held.set_trainable(name in state.acting and not state.adapters[name].config.inference_mode)
        state.trained = set(state.acting)

    def _trained(self) -> set[str]:
        """The adapters of which something trains: those that lorafx let train, and those that somebody else did.

        The latter are told by the module that has their first tensor, for there may be a million of tensors.
        """
        state = self._lorafx
        for name in state.adapters.keys() - state.first.keys():
            owner, _, last = next(state.adapters[name].paths, "").rpartition(".")
            state.first[name] = module_at(self.tree, owner)._parameters, last
        # One flat loop: there may be a thousand of adapters, and a switch is to take less than a millisecond.
        first = [(name, own.get(last)) for name, (own, last) in state.first.items()]
        by_others = {name for name, tensor in first if tensor is not None and tensor.requires_grad}
        return (state.trained | by_others) & state.adapters.keys()


def _taken(adapter: Adapter) -> dict[str, dict[str, Spec]]:
    """The weights that an adapter takes start values out of, and the tensors that these are for."""
    takes = adapter.kind.takes_from_base
    return {site.weight: adapter.specs(site) for site in adapter.selection if takes(site, adapter.config)}
