"""Allocation: after each training step, an adapter's ranks are shared out among its sites (AdaLoRA's)."""

from __future__ import annotations

from dataclasses import replace

from ..errors import AdapterError
from .merges import Merges
from .penalties import tensors_by_name


class Allocation(Merges):
    """The part of an adapted model that allocates ranks."""

    def update_and_allocate(self, global_step: int) -> None:
        """Share out the ranks of each active AdaLoRA adapter that trains, as the schedule in its config says.

        Call it after each step: after `backward()` and `optimizer.step()`, before `zero_grad()`. Directions are set to
        zero in place, so that nothing is captured or compiled again; the config's `rank_pattern` says which are left.
        Raises `AdapterError`, with nothing changed, if no such adapter trains, one is merged, or there is no gradient.
        """
        state, allocated = self._lorafx, 0
        for name in state.acting:
            adapter = state.adapters[name]
            fresh = adapter.kind.allocator(adapter.config)
            if fresh is None or adapter.config.inference_mode:
                continue
            self._require_unmerged(name, "allocating its ranks")
            allocated += 1
            sites = {site: tensors_by_name(self.tree, adapter, site) for site in adapter.tensors}
            left = state.allocators.setdefault(name, fresh).step(global_step, adapter.config, sites)
            if left is not None:
                state.adapters[name] = replace(adapter, config=adapter.config.replace(rank_pattern=left))
        if not allocated:
            raise AdapterError("no active adapter that trains has ranks to allocate: that is for an AdaLoraConfig's")
