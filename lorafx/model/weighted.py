"""Adapters made of others, by weights: PEFT's `add_weighted_adapter`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.combining import Combination
from ..adapters.config import is_number, require
from ..adapters.planning import plan
from ..adapters.site import Selection, Site
from ..adapters.slots import used, without_room
from ..errors import AdapterError, ConfigError, SelectionError
from ..files.written_config import targets_by_name
from ..tree.lookup import tensor_at
from ..tree.mirror import mirrored
from .adapters import Adapters

_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_WHOLE = ("modules_to_save", "bias", "task_type")  # what says which base tensors it trains as a whole


class Weighted(Adapters):
    """The part of an adapted model that makes one adapter of several."""

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        *,
        random_state: int | None = None,
    ) -> None:
        """Add an adapter that does what others do by these weights, negative ones too; `set_adapter` makes it active.

        Positions, names and what comes out are PEFT's; `lorafx.adapters.combining` has the formulas. "cat" is exact, of
        all ranks together; "svd" is the nearest of `svd_rank` (None for the largest rank); "linear", "ties",
        "dare_linear", "dare_ties" and "magnitude_prune" combine A with A and B with B, which needs one rank at each
        site, and with "_svd" whole updates. The last four keep a share `density` of the entries; DARE draws which, by
        `random_state` or torch's global generator. A single adapter is only multiplied. What they are scaled by now
        counts. What one of them trains as a whole (`modules_to_save`, `bias`) is taken over as it is.

        Raises, with the model as it was, `AdapterError` for a name that is unknown or taken, ranks that differ where
        they may not, several adapters that train one tensor as a whole, or start values taken out of the base;
        `ConfigError` for other arguments, and kinds and sites that cannot be combined.
        """
        how = Combination(
            *(combination_type, svd_rank, svd_clamp, svd_full_matrices, svd_driver, density, majority_sign_method)
        )
        self._require_free(adapter_name)
        require(not isinstance(adapters, str), "adapters", adapters, "a list of names")
        sources = [used(self._adapter(name)) for name in adapters]
        _require_weights(weights, len(sources))
        self._require_combinable(sources)
        how = how.of_one() if len(sources) == 1 else how
        with torch.inference_mode(False), torch.no_grad():
            adapter = self._planned(adapter_name, sources, how)
            values = self._combined(adapter, sources, weights, how, random_state) | self._taken_over(adapter, sources)
            self._install(adapter, values=values)

    def _require_combinable(self, sources: Sequence[Adapter]) -> None:
        """Raise `AdapterError` for adapters of which no single one can do what they do together."""
        self._require_together(adapter.name for adapter in sources)
        if len(kinds := {adapter.config.peft_type for adapter in sources}) > 1:
            raise AdapterError(f"adapters of one type can be combined into one, these are {', '.join(sorted(kinds))}")
        for adapter in sources:
            adapter.require_in_place(self.tree)
            if adapter.takes_from_base:
                raise AdapterError(
                    f"{adapter.name!r} took its start values out of the base's weights, so it has a meaning on what is "
                    "left of these alone: save it with `path_initial_model_for_weight_conversion`, and combine that"
                )

    def _planned(self, name: str, sources: Sequence[Adapter], how: Combination) -> Adapter:
        """The adapter to make, at all the sites of the others."""
        sites = Selection()
        for adapter in sources:
            sites |= adapter.selection
        config = sources[0].kind.combined_config([a.config for a in sources], [a.selection for a in sources], how)
        if len({tuple(getattr(a.config, field) for field in _TARGETS) for a in sources}) > 1:
            named = targets_by_name(self.tree, sorted(site.name for site in sites))
            config = config.replace(**(dict.fromkeys(_TARGETS) | named))
        owner = next((a.config for a in sources if a.replaced), config)
        config = config.replace(**{field: getattr(owner, field) for field in _WHOLE if hasattr(owner, field)})
        adapter = plan(mirrored(self.tree), name, config)
        if {site.name for site in adapter.selection} != {site.name for site in sites}:
            raise SelectionError(
                f"no one config picks all that {', '.join(a.name for a in sources)} adapt and nothing else: "
                f"{sorted({site.name for site in adapter.selection} ^ {site.name for site in sites})}"
            )
        return adapter

    def _combined(
        self, adapter: Adapter, sources: Sequence[Adapter], weights: Sequence[float], how: Combination, seed: int | None
    ) -> dict[str, Tensor]:
        """The new adapter's values, by path, site by site."""
        rng = None if seed is None else torch.Generator().manual_seed(seed)
        values: dict[str, Tensor] = {}
        for site in adapter.selection:
            parts = [
                (float(weight), self._operands(source, source.selection.by_name[site.name]))
                for source, weight in zip(sources, weights)
                if site.name in source.selection.by_name
            ]
            tensors = adapter.kind.combined(site, adapter.config, parts, how, rng)
            specs = adapter.kind.tensors(site, adapter.config)
            values |= {adapter.tensors[site.name][specs[name].suffix]: tensor for name, tensor in tensors.items()}
        return values

    def _operands(self, adapter: Adapter, site: Site) -> Any:
        paths = adapter.tensors[site.name]
        own = without_room(adapter, {path: tensor_at(self.tree, path) for path in paths.values()})
        tensors = {suffix: own[path] for suffix, path in paths.items()}
        if bare := next((suffix for suffix, tensor in tensors.items() if tensor.is_meta), None):
            raise AdapterError(f"{adapter.name!r} has no values for {site.name}.{bare}: load it before combining it")
        wide = {name: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for name, tensor in tensors.items()}
        return adapter.operands(site, wide, adapter.numbers(self.tree, site))

    def _taken_over(self, adapter: Adapter, sources: Sequence[Adapter]) -> dict[str, Tensor]:
        """The values of the adapter's own copies of base tensors, by path: those of the one that has them."""
        copies = {base: path for source in sources for base, path in source.replaced.items()}
        return {path: self._without_merged(copies.get(base, base)) for base, path in adapter.replaced.items()}


def _require_weights(weights: Sequence[float], count: int) -> None:
    listed = isinstance(weights, Sequence) and not isinstance(weights, str)
    fit = listed and all(is_number(weight) for weight in weights)
    require(fit, "weights", weights, "a list of finite numbers")
    if not count or len(weights) != count:
        raise ConfigError(f"there are {len(weights)} weights for {count} adapters: each needs one")
