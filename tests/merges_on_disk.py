"""Base models and adapters in folders, and what merging them in memory gives, for tests of merging on disk."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import lorafx

LINEAR = {"target_modules": "all-linear"}


def loaded(folder: Path, cls: type[PreTrainedModel], dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    return cls.from_pretrained(folder, dtype=dtype)


def base_folder(folder: Path, model: nn.Module, dtype: torch.dtype = torch.float32, shard: str = "20KB") -> Path:
    """The model, saved in files of at most that size, as it is saved again once it was loaded."""
    model.to(dtype).save_pretrained(folder / "first")  # type: ignore[operator]
    again = loaded(folder / "first", type(model))  # type: ignore[arg-type]
    again.save_pretrained(folder / "base", max_shard_size=shard)
    return folder / "base"


def adapter_folder(base: Path, cls: type[PreTrainedModel], seed: int = 0, **settings: Any) -> Path:
    """An adapter that changes whatever it has: its copies of base tensors are no start values either."""
    config = {"r": 4, "lora_alpha": 6, "init_lora_weights": False} | settings
    lora = quietly(lorafx.compile, loaded(base, cls), config, random_state=seed)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "modules_to_save" in name or "trained_bias" in name:
                parameter.add_(torch.randn(parameter.shape, generator=rng).to(parameter.dtype))
    folder = base.parent / f"adapter-{seed}"
    quietly(lorafx.of(lora).save_pretrained, folder)
    return folder


def merged_in_memory(base: Path, cls: type[PreTrainedModel], adapters: Sequence[Path]) -> PreTrainedModel:
    """The model with these adapters merged into it, by `merge_and_unload`."""
    names = ["default", *(f"adapter_{number}" for number in range(2, len(adapters) + 1))]
    lora = lorafx.of(quietly(lorafx.load, loaded(base, cls), adapters[0]))
    for name, folder in list(zip(names, adapters))[1:]:
        quietly(lora.load_adapter, folder, name)
    lora.set_adapter(names)
    return quietly(lora.merge_and_unload)


def merge(*args: Any, **how: Any) -> Path:
    return quietly(lorafx.merge, *args, **how)


def quietly(function: Any, *args: Any, **how: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **how)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, by its path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    """The same tensors, bit for bit."""
    assert one.keys() == two.keys(), one.keys() ^ two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype and torch.equal(tensor, two[name]), name
