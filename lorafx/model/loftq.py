"""LoftQ for a base that is quantised: adapters start as what quantising took (Li et al., 2023, arXiv 2310.08659).

B A  ≈  W - dequantised(Q)        W from the files of the full model, one tensor in memory at a time
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from tqdm import tqdm

from ..adapters.adapter import Adapter
from ..adapters.site import Site
from ..errors import AdapterError, CheckpointError
from ..files.base import read_shards
from ..files.shards import Shard
from ..files.written_config import name_of
from ..tree.lookup import tensor_at
from .adaptation import of
from .adapted_model import AdaptedModel

Callback = Callable[[nn.Module, str], bool]


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: AdaptedModel,
    model_path: str | os.PathLike[str] | None = None,
    adapter_name: str = "default",
    callback: Callback | None = None,
) -> None:
    """Give an adapter on a quantised base the start values that make up best for the quantising, as PEFT does.

    At each site with a quantised weight, A (r, in) and B (out, r) become the r largest singular values of what the
    full weight differs by from the quantised one. Do this before training.

    Args:
        model_path: the full model's `model.safetensors`, whole or in shards with an index, or the folder that has it;
            None for the folder here, or the Hub's files on this machine, that the base was loaded from.
        callback: called with the model and the module's path after each site; where it gives False, the site keeps the
            values it had. Calling it all again may find more.

    Raises `AdapterError` for an unknown or merged adapter, one with no site whose weight is quantised, and a model that
    is not adapted; `CheckpointError` where the files lack a weight or have it in another shape; `ConfigError` for a
    kind other than LoRA. The adapter is as it was in each case, and where the callback raises.
    """
    adapter = of(peft_model)._require_unmerged(adapter_name, "replacing its values")
    sites = [site for site in adapter.selection if site.storage.lossy and site.storage.readable]
    if not sites:
        raise AdapterError(
            f"{adapter_name!r} adapts no quantised weight that can be read: there is nothing to make up for"
        )
    files = _FullWeights.of(peft_model, model_path)
    files.require(sites)
    before = {
        path: tensor_at(peft_model, path).clone() for site in sites for path in adapter.tensors[site.name].values()
    }
    try:
        for site in tqdm(sites, "loftq", disable=None):
            _replace(peft_model, adapter, site, files, callback)
    except BaseException:
        for path, value in before.items():
            tensor_at(peft_model, path).copy_(value)
        raise


def _replace(tree: Any, adapter: Adapter, site: Site, files: _FullWeights, callback: Callback | None) -> None:
    """New values at a site, kept unless the callback says no."""
    own, specs = adapter.tensors_at(tree, site), adapter.kind.tensors(site, adapter.config)
    before = {suffix: tensor.clone() for suffix, tensor in own.items()}
    dense = site.storage.dense(site.storage.stored(tree.get_submodule(site.module), site.parameter)).float()
    delta = files.read(site).to(dense.device, torch.float32) - dense
    values = {name: torch.empty(spec.shape, device=dense.device) for name, spec in specs.items()}
    adapter.kind.approach(site, adapter.config, values, delta)
    for name, spec in specs.items():
        own[spec.suffix].copy_(values[name])
    if callback is not None and not callback(tree, site.module):
        for suffix, tensor in own.items():
            tensor.copy_(before[suffix])


class _FullWeights:
    """The weights of a full model in safetensors files, by the keys that they have there."""

    def __init__(self, shards: Iterable[Shard], prefix: str):
        self.prefix = prefix
        self.shards = {key: shard for shard in shards for key in shard.entries}

    @classmethod
    def of(cls, tree: nn.Module, given: str | os.PathLike[str] | None) -> _FullWeights:
        place = Path(given) if given is not None else _loaded_from(tree)
        place = place.parent if place.suffix == ".safetensors" and not place.exists() else place
        shards = [Shard.read(place)] if place.is_file() else read_shards(place)[0].values()
        return cls(shards, f"{getattr(tree, 'base_model_prefix', '')}.")

    def _key(self, site: Site) -> str | None:
        """What the files call a site's weight: with or without the name of the inner model."""
        return next((key for key in (site.weight, site.weight.removeprefix(self.prefix)) if key in self.shards), None)

    def require(self, sites: list[Site]) -> None:
        """Raise `CheckpointError` if the files lack a weight, or have it in another shape."""
        for site in sites:
            key = self._key(site)
            if key is None:
                raise CheckpointError(f"no file of the full model has {site.weight}; pass `model_path`")
            shard = self.shards[key]
            if (shape := shard.entries[key].shape) != tuple(site.weight_shape):
                raise CheckpointError(f"{shard.file}: {key} is {shape}, and the model needs {site.weight_shape}")

    def read(self, site: Site) -> Tensor:
        key = self._key(site)
        assert key is not None, "what was required is there"
        return self.shards[key].tensor(key)


def _loaded_from(tree: nn.Module) -> Path:
    """The folder of the files that a base was loaded from; nothing is fetched."""
    name = name_of(tree)
    if name is None:
        raise CheckpointError("the model does not say what it was loaded from: pass `model_path`")
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name} is no folder, nor a model whose files are on this machine: {error}") from error
