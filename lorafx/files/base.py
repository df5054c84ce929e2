"""A base model's checkpoint in a folder, as transformers writes it: config.json, safetensors files, other files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .hub import snapshot
from .shards import Entry, Shard

CONFIG, WHOLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# Weights in other formats, which would stay what they were before a merge.
OTHER_WEIGHTS = (
    *("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.ot", "*.npz"),
    *("*.onnx", "*.onnx_data", "*.gguf", "*.tflite", "*.mlmodel"),
)


@dataclass(frozen=True)
class BaseFolder:
    """A base model's checkpoint: its config, its safetensors files by name, and their index if there are several."""

    folder: Path
    config: dict[str, Any]
    shards: dict[str, Shard]
    index: dict[str, Any] | None

    @property
    def entries(self) -> dict[str, Entry]:
        """All tensors, by key."""
        return {key: entry for shard in self.shards.values() for key, entry in shard.entries.items()}

    def shard_of(self, key: str) -> Shard:
        """The file that holds a tensor."""
        return next(shard for shard in self.shards.values() if key in shard.entries)

    def others(self) -> tuple[list[Path], list[Path]]:
        """The files beside the model's own, relative: those to keep (tokenizer, …), and weights, which nobody merges.

        What is hidden is in neither.
        """
        own = {CONFIG, INDEX, *self.shards}
        files = [file for file in _visible(self.folder) if str(file) not in own]
        weights = [file for file in files if any(file.match(pattern) for pattern in (*OTHER_WEIGHTS, "*.safetensors"))]
        return [file for file in files if file not in weights], weights


def _visible(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from ((Path(place) / name).relative_to(folder) for name in sorted(names) if not name.startswith("."))


def read_base(place: str | os.PathLike[str]) -> BaseFolder:
    """Read what there is in a folder, or in a repository on the Hub, but no tensor.

    Raises `CheckpointError` for a folder that is no model's, for a checkpoint that is quantised or not of safetensors,
    and for files that are missing, damaged or not listed in the index.
    """
    folder = Path(place) if Path(place).is_dir() else snapshot(os.fspath(place), OTHER_WEIGHTS)
    if (folder / "adapter_config.json").exists() and not (folder / CONFIG).exists():
        raise CheckpointError(f"{folder} is an adapter's folder; the base model comes first, then its adapters")
    config = _json(folder / CONFIG)
    if config.get("quantization_config") or config.get("compression_config"):
        settings = config.get("quantization_config") or config["compression_config"]
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        raise CheckpointError(
            f"{folder} is stored quantised ({method or 'see its config.json'}): merging into that would round a second "
            f"time. Give the original checkpoint, which the adapter can be merged onto just as well"
        )
    return BaseFolder(folder, config, *read_shards(folder))


def read_shards(folder: Path) -> tuple[dict[str, Shard], dict[str, Any] | None]:
    """The safetensors files of a model in a folder, by name, and the index that lists them if there are several.

    Raises `CheckpointError` for files that are missing, damaged, of another format or not listed in the index.
    """
    names, index = _names(folder)
    shards = {name: Shard.read(folder / name) for name in names}
    _require_one_place(folder, shards, index)
    return shards, index


def _names(folder: Path) -> tuple[list[str], dict[str, Any] | None]:
    """The names of the safetensors files, and the index that lists them."""
    if (folder / WHOLE).exists():
        return [WHOLE], None
    if (folder / INDEX).exists():
        index = _json(folder / INDEX)
        names = sorted(set(index.get("weight_map", {}).values()))
        if wrong := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
            raise CheckpointError(f"{folder / INDEX} lists {wrong[0]!r}, which is no safetensors file beside it")
        return names, index
    others = sorted(file.name for pattern in OTHER_WEIGHTS for file in folder.glob(pattern))
    there = f"there is {', '.join(others[:3])}, which" if others else "whatever else"
    raise CheckpointError(
        f"{folder} has no {WHOLE} and no {INDEX}; {there} transformers can load has to be converted first: "
        f'AutoModelForCausalLM.from_pretrained("{folder}", dtype="auto").save_pretrained(…), or the class of its own'
    )


def _require_one_place(folder: Path, shards: dict[str, Shard], index: dict[str, Any] | None) -> None:
    """Raise `CheckpointError` unless each tensor is in one file, the one that the index says."""
    placed: dict[str, str] = {}
    for name, shard in shards.items():
        for key in shard.entries:
            if key in placed:
                raise CheckpointError(f"{folder}: {key} is in two files, {placed[key]} and {name}")
            placed[key] = name
    for key, name in (index or {}).get("weight_map", {}).items():
        if placed.get(key) != name:
            raise CheckpointError(f"{folder / INDEX} says that {key} is in {name}, and it is not")


def _json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} does not exist; is {file.parent} a model's folder?") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return values
