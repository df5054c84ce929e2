"""Hot swap: an adapter takes the values of another from a file, in place, while the model serves calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import Adapter, remove
from ..adapters.building import scaled
from ..adapters.config import require
from ..adapters.expert_names import with_experts
from ..adapters.kinds import SCALING, config_of
from ..adapters.planning import plan
from ..adapters.slots import add_idle, differences, idles, put, require_swappable, widened
from ..adapters.storages import keep_own_layers
from ..errors import AdapterError, ConfigError, warn
from ..files import checkpoint
from ..tree.attached import attach, set_trainable
from ..tree.lookup import copy_into, tensor_at
from ..tree.mirror import mirrored
from .adapters import Adapters
from .calls import serve_parts


class HotSwap(Adapters):
    """The part of an adapted model that swaps adapters while it runs."""

    def hotswap_adapter(
        self,
        model_name_or_path: str | Path,
        adapter_name: str,
        torch_device: str | None = None,
        *,
        weights_only: bool = False,
        **hub: Any,
    ) -> None:
        """Have an adapter become the one in a folder or Hub id, under its own name: values, ranks and scaling.

        Its parameters stay the same objects at the same addresses, and where it was prepared (`prepare_for_hotswap`)
        nothing is rewritten, captured or compiled. Without that a rank can be smaller, not larger, and another scaling
        has graphs rewritten once. Sites that the file leaves out do nothing; what is saved is what the file says. A
        scale that was set is 1 again. Whether it trains stays as it was. `torch_device` changes nothing: values go from
        the file to where the adapter's are. Other arguments are those of `load_adapter`.

        Raises, with all values as they were, `AdapterError` for a name that is unknown or merged, and for a file that
        does not fit, saying how to prepare for it; `CheckpointError` and others as `lorafx.load` does.
        """
        slot = self._require_unmerged(adapter_name, "swapping other values into it")
        slot.require_in_place(self.tree)
        found = checkpoint.read(model_name_or_path, weights_only=weights_only, **hub)
        trained = not slot.config.inference_mode
        adapter, values, embeddings = checkpoint.fit(mirrored(self.tree), adapter_name, found, trained)
        require_swappable(self.tree, slot, adapter)
        idle = frozenset(name for name in slot.tensors if name not in adapter.tensors)
        filled = replace(slot, config=adapter.config, idle=idle)
        nothing = {
            path: torch.zeros_like(tensor_at(self.tree, path)) for name in idle for path in slot.tensors[name].values()
        }
        put(self.tree, filled, values | nothing)
        copy_into(self.tree, embeddings)
        if slot.scales or _scalings(filled) != _scalings(slot):
            with torch.inference_mode(False), torch.no_grad():
                filled = scaled(self.tree, filled, 1.0)
        self._lorafx.adapters[adapter_name] = filled

    def prepare_for_hotswap(
        self, target_rank: int | None = None, config: Any | None = None, check_compiled: str = "error"
    ) -> None:
        """Give every adapter that has a rank room for others, before the model is compiled.

        Its tensors get the shapes of `target_rank`, zero beyond its own rank, and its scaling becomes a tensor: what it
        computes, and what is saved of it, stays as it is. With a `config`, or a mapping of several, it gets tensors of
        zeros wherever an adapter of that config has its own. Parameters that grow are new objects: make optimizers
        afterwards. Graphs that are kept are made again when next they are needed; where some are compiled already
        `check_compiled` says whether that is an "error", to "warn" of, or to "ignore".

        Raises, with the model as it was, `AdapterError` if no adapter has a rank, one is merged or of a larger rank,
        or a config asks for more than other sites and ranks; `ConfigError` for other arguments.
        """
        whole = isinstance(target_rank, int) and not isinstance(target_rank, bool) and target_rank > 0
        require(target_rank is None or whole, "target_rank", target_rank, "a positive int or None")
        slots = [adapter for adapter in self._lorafx.adapters.values() if _can_hold_others(adapter, target_rank)]
        if not slots:
            types = ", ".join(sorted({each.config.peft_type for each in self._lorafx.adapters.values()})) or "none"
            raise AdapterError(
                f"no adapter here can hold others ({types}): {'more sites' if target_rank is None else 'larger ranks'} "
                "have no values that do nothing there; load an adapter that can before preparing it"
            )
        for slot in slots:
            self._require_unmerged(slot.name, "preparing it for others")
            slot.require_in_place(self.tree)
        self._check_compiled(check_compiled)
        others = [with_experts(mirrored(self.tree), each) for each in self._configs(config)]
        planned = {slot.name: list(self._planned_for(slot, others, target_rank)) for slot in slots}
        before = [{path: tensor_at(self.tree, path) for path in slot.paths} for slot in slots]
        with torch.inference_mode(False), torch.no_grad():
            wide = [widened(self.tree, slot, planned[slot.name], target_rank) for slot in slots]
            self._add_idle(slots, planned)
            for adapter, tensors in wide:
                for path, tensor in tensors.items():
                    attach(self.tree, path, tensor)
                self._lorafx.adapters[adapter.name] = self._scaled_as_before(adapter)
                keep_own_layers(self.tree, [site.module for site in adapter.selection])
                serve_parts(self.tree, adapter)
        for slot, tensors in zip(slots, before):
            self._train_alike(slot, tensors)
        self._lorafx.forget_programs()

    def _check_compiled(self, how: str) -> None:
        require(how in ("error", "warn", "ignore"), "check_compiled", how, '"error", "warn" or "ignore"')
        pieces = (p for d in self._lorafx.dispatchers for p in d.graphs.lowering.pieces.values())
        if how == "ignore" or not any(piece.compiled for piece in pieces):
            return
        said = "graphs of this model are compiled already, and will be again: prepare it before its first call"
        if how == "error":
            raise AdapterError(f'{said}, or pass check_compiled="ignore"')
        warn(said)

    def _configs(self, config: Any | None) -> list[Any]:
        """The configs that `prepare_for_hotswap` is given: none, one, or a mapping of several as `peft_config` is."""
        if config is None:
            return []
        several = isinstance(config, Mapping) and all(hasattr(each, "peft_type") for each in config.values())
        found = [config_of(each) for each in (config.values() if several else [config])]
        types = {adapter.config.peft_type for adapter in self._lorafx.adapters.values()}
        if odd := [each.peft_type for each in found if each.peft_type not in types]:
            raise ConfigError(
                f"there is no adapter of type {odd[0]} that could take the values of another of this config"
            )
        return found

    def _planned_for(self, slot: Adapter, configs: list[Any], r: int | None) -> Iterator[Adapter]:
        """What adapters of these configs would be in the slot's place, with room for rank `r`."""
        for config in (each for each in configs if each.peft_type == slot.config.peft_type):
            wide = config if r is None else slot.kind.of_rank(config, r)
            other = plan(mirrored(self.tree), slot.name, wide)
            beyond = [site.name for site in other.selection if site.name not in slot.tensors]
            if beyond and not idles(slot):
                raise AdapterError(
                    f"{slot.name!r} cannot have {', '.join(beyond)} besides: {slot.config.peft_type} has no values "
                    "that do nothing there, so it takes adapters of its own sites alone"
                )
            differ = differences(slot, other, sizes=False)
            if differ or other.replaced != slot.replaced:
                raise AdapterError(
                    f"{slot.name!r} could not take the values of an adapter of this config: they differ in "
                    f"{', '.join(differ) or 'what they train as a whole'}"
                )
            yield other

    def _add_idle(self, slots: list[Adapter], planned: Mapping[str, list[Adapter]]) -> None:
        done: list[Adapter] = []
        try:
            for slot in slots:
                done += planned[slot.name]
                add_idle(self.tree, slot, planned[slot.name], self._lorafx.autocast_adapter_dtype)
        except BaseException:
            for other in done:
                kept = self._lorafx.adapters[other.name].tensors
                remove(self.tree, other.restricted_to([s.weight for s in other.selection if s.name not in kept], ()))
            raise

    def _train_alike(self, slot: Adapter, before: Mapping[str, Tensor]) -> None:
        """Have what is new of an adapter train if anything of it did before, also after a `disable_adapter` block."""
        tensors = {path: tensor_at(self.tree, path) for path in self._lorafx.adapters[slot.name].paths}
        new = [tensor for path, tensor in tensors.items() if path not in before]
        set_trainable(new, any(tensor.requires_grad for tensor in before.values()))
        for found in self._lorafx.blocks.values():
            trained = {path for path, tensor in before.items() if any(tensor is each for each in found.trained)}
            found.trained.extend([*(tensors[path] for path in trained), *(new if trained else ())])

    def _scaled_as_before(self, adapter: Adapter) -> Adapter:
        """The adapter with its scaling as a tensor at every site; where that was one already it keeps its value."""
        before = {path: tensor_at(self.tree, path).clone() for path in adapter.scales.values()}
        adapter = scaled(self.tree, adapter, 1.0)
        copy_into(self.tree, before)
        return adapter


def _can_hold_others(adapter: Adapter, target_rank: int | None) -> bool:
    """Whether an adapter can have room for a larger rank; or, if none is asked for, for other sites."""
    return bool(adapter.kind.sized(adapter.config)) or (target_rank is None and idles(adapter))


def _scalings(adapter: Adapter) -> list[float | None]:
    numbers = (adapter.kind.numbers(s, adapter.config) for s in adapter.selection if s.name not in adapter.idle)
    return [each.get(SCALING) for each in numbers]
