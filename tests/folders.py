"""Adapters that tell in a folder which they are, for tests of how a folder is replaced."""

from __future__ import annotations

from pathlib import Path

import models
import torch

import lorafx


def adapter(rank: int) -> lorafx.AdaptedModel:
    """An adapter that can be recognised: each of its values is its rank, its alpha three times that."""
    config = lorafx.LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=["up", "down"])
    lora = lorafx.compile(models.mlp(), config)
    with torch.no_grad():
        for parameter in lora.parameters():
            if parameter.requires_grad:
                parameter.fill_(rank)
    return lora


def rank_of(folder: Path, **how: bool) -> int:
    """The rank of the adapter in a folder, after checking that config, shapes and values all say the same."""
    lora = lorafx.load(models.mlp(), folder, **how)
    config = lora.peft_config["default"]
    assert config.lora_alpha == 3 * config.r
    own = {name: parameter for name, parameter in lora.named_parameters() if "lora_" in name}
    assert len(own) == 4
    for name, parameter in own.items():
        assert parameter.shape[0 if "lora_A" in name else 1] == config.r
        assert bool((parameter == config.r).all()), name
    return config.r


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def partials(place: Path) -> list[Path]:
    return [path for path in place.rglob("*") if ".partial" in path.name]


def furnish(folder: Path) -> dict[str, bytes]:
    """Put files and subfolders of the user's own into a folder; returns them."""
    own = {"notes.txt": b"mine", ".hidden": b"too", "logs/a/events": b"\x00" * 70, "second/adapter_config.json": b"{}"}
    for name, data in own.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return own


def furnished(place: Path) -> Path:
    """A folder below `place` with the adapter of rank 2, and with what others have put there."""
    folder = place / "place" / "adapter"
    adapter(2).save_pretrained(folder)
    furnish(folder)
    return folder
