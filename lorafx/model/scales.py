"""The scales of an adapted model's adapters: what they add to their layers, times a number that may change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..adapters.building import scaled
from ..adapters.config import is_number, require
from ..adapters.kinds import SCALING
from ..errors import AdapterError
from ..tree.lookup import copy_into, find_tensor, tensor_at
from .merges import Merges
from .part import between_calls


class Scales(Merges):
    """The part of an adapted model that changes the scales of its adapters."""

    @between_calls
    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Multiply what an adapter adds to its layers by `scale`, on top of α / r; 1 is as it was trained.

        The first call makes the scaling a tensor, for which graphs are rewritten; further ones capture, rewrite and
        compile nothing, so that the scale may follow a schedule. It is not part of the adapter's file. Raises
        `AdapterError` for an unknown name, a merged adapter, a kind without scaling, or a model on the meta device.
        """
        self._require_scalable(adapter_name)
        self._require_not_merged(adapter_name)
        value = number(scale)
        with torch.inference_mode(False), torch.no_grad():
            self._lorafx.adapters[adapter_name] = scaled(self.tree, self._adapter(adapter_name), value)

    def _require_scalable(self, name: str) -> None:
        adapter = self._adapter(name)
        if not any(SCALING in adapter.kind.numbers(site, adapter.config) for site in adapter.selection):
            raise AdapterError(f"adapters of type {adapter.config.peft_type} have no scaling that could be changed")
        bare = next((site.name for site in adapter.selection if self.tree.get_parameter(site.weight).is_meta), None)
        if bare is not None:
            raise AdapterError(f"{bare} is on the meta device, which holds no values: load it before setting a scale")

    def _require_not_merged(self, name: str) -> None:
        if name in self._lorafx.ledger.names:
            raise AdapterError(f"{name!r} is merged; unmerge it before changing its scale")

    @between_calls
    @contextlib.contextmanager
    def rescale(self, multiplier: float) -> Iterator[None]:
        """Multiply the scales of the active adapters within a `with` block, as PEFT's `rescale_adapter_scale` does.

        What is merged within the block is merged anew after it.
        """
        active = list(self._lorafx.active)
        for name in active:
            self._require_scalable(name)
            self._require_not_merged(name)
        for name in active:
            if not self._adapter(name).scales:
                self.set_scale(name, 1.0)
        paths = [path for name in active for path in self._adapter(name).scales.values()]
        before = {path: tensor_at(self.tree, path).clone() for path in paths}
        with torch.inference_mode(False), torch.no_grad():
            for path in paths:
                tensor_at(self.tree, path).mul_(multiplier)
        try:
            yield
        finally:
            merged = bool({*active} & {*self._lorafx.ledger.names})
            with self._unmerged() if merged else contextlib.nullcontext():
                copy_into(self.tree, {p: value for p, value in before.items() if find_tensor(self.tree, p) is not None})


def number(scale: Any) -> float:
    """A scale as a float; `ConfigError` if it is none."""
    value = scale.item() if isinstance(scale, Tensor) and scale.numel() == 1 else scale
    require(is_number(value), "scale", scale, "a finite number")
    return float(value)
