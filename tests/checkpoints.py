"""Adapters in folders, for tests of what is written and of what is read."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import models
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorafx
from lorafx.files.checkpoint import CONFIG, OLD_WEIGHTS, WEIGHTS

PREFIX = "base_model.model."
SITE = "model.layers.0.self_attn.q_proj"
A_KEY, B_KEY = f"{PREFIX}{SITE}.lora_A.weight", f"{PREFIX}{SITE}.lora_B.weight"
SETTINGS: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "down_proj"],
    "modules_to_save": ["norm"],
    "init_lora_weights": False,
}


def base_model(**overrides: Any) -> nn.Module:
    return models.llama(num_hidden_layers=1, **overrides)


def adapted(base: nn.Module | None = None, **settings: Any) -> lorafx.AdaptedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lorafx.compile(base or base_model(), SETTINGS | settings, random_state=1)


def load(folder: Path, base: nn.Module | None = None, **how: Any) -> lorafx.AdaptedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lorafx.load(base or base_model(), folder, **how)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


def set_config(folder: Path, **values: Any) -> None:
    (folder / CONFIG).write_text(json.dumps(config_of(folder) | values))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


def set_tensors(folder: Path, **changes: Tensor | None) -> None:
    """Write the folder's weights again with some tensors replaced, added, or (None) left out."""
    tensors = {**tensors_of(folder), **changes}
    save_file({key: t.contiguous() for key, t in tensors.items() if t is not None}, folder / WEIGHTS)


def to_pickle(folder: Path) -> None:
    torch.save(tensors_of(folder), folder / OLD_WEIGHTS)
    (folder / WEIGHTS).unlink()
