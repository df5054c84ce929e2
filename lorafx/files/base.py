"""A base model's checkpoint in a folder, as transformers writes it: config.json, safetensors files, other files.

Where there are files of torch's alone (`.bin`), these are read as if they were safetensors, under those names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from . import pickled
from .hub import snapshot
from .pickled import PickledShard, name_as_safetensors
from .shards import Entry, Shard

CONFIG, WHOLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# Weights in other formats, which would stay what they were before a merge.
OTHER_WEIGHTS = (
    *("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.ot", "*.npz"),
    *("*.onnx", "*.onnx_data", "*.gguf", "*.tflite", "*.mlmodel"),
)


@dataclass(frozen=True)
class BaseFolder:
    """A base model's checkpoint: its config, its safetensors files by name, and their index if there are several.

    Files of torch's are here by the names that they have as safetensors, in the index, too.
    """

    folder: Path
    config: dict[str, Any]
    shards: dict[str, Shard]
    index: dict[str, Any] | None

    @property
    def quantised(self) -> str | None:
        """By which method the config says that weights are stored quantised; None if it does not."""
        settings = self.config.get("quantization_config") or self.config.get("compression_config")
        if not settings:
            return None
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        return str(method or f"see its {CONFIG}")

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
        own = {CONFIG, INDEX, pickled.INDEX, *(shard.file.name for shard in self.shards.values())}
        files = [file for file in _visible(self.folder) if str(file) not in own]
        weights = [file for file in files if any(file.match(pattern) for pattern in (*OTHER_WEIGHTS, "*.safetensors"))]
        return [file for file in files if file not in weights], weights


def _visible(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from ((Path(place) / name).relative_to(folder) for name in sorted(names) if not name.startswith("."))


def read_base(
    place: str | os.PathLike[str], revision: str | None = None, token: str | bool | None = None
) -> BaseFolder:
    """Read what there is in a folder, or in a repository on the Hub, but no tensor.

    `revision` and `token` are `huggingface_hub`'s. Raises `CheckpointError` for a folder that is no model's, for a
    checkpoint of other formats, and for files that are missing, damaged or not in the index.
    """
    folder = Path(place) if Path(place).is_dir() else _fetched(os.fspath(place), revision, token)
    if (folder / "adapter_config.json").exists() and not (folder / CONFIG).exists():
        raise CheckpointError(f"{folder} is an adapter's folder; the base model comes first, then its adapters")
    return BaseFolder(folder, _json(folder / CONFIG), *read_shards(folder))


def _fetched(repo_id: str, revision: str | None, token: str | bool | None) -> Path:
    """A repository's files, without weights in other formats; torch's own where there are no others."""
    folder = snapshot(repo_id, OTHER_WEIGHTS, revision, token)
    if (folder / WHOLE).exists() or (folder / INDEX).exists():
        return folder
    others = [pattern for pattern in OTHER_WEIGHTS if not pattern.startswith("*.bin")]
    return snapshot(repo_id, others, revision, token)


def read_shards(folder: Path) -> tuple[dict[str, Shard], dict[str, Any] | None]:
    """The files of a model in a folder, by their names as safetensors, and the index that lists them if there is one.

    Raises `CheckpointError` for files that are missing, damaged, of another format or not listed in the index.
    """
    names, index = _names(folder)
    shards = {name: _read(folder / name) for name in names}
    _require_one_place(folder, shards, index)
    if not any(isinstance(shard, PickledShard) for shard in shards.values()):
        return shards, index
    places = None if index is None else {k: name_as_safetensors(name) for k, name in index["weight_map"].items()}
    named = {name_as_safetensors(name): shard for name, shard in shards.items()}
    return named, None if index is None else index | {"weight_map": places}


def _read(file: Path) -> Shard:
    return PickledShard.read(file) if file.suffix == ".bin" else Shard.read(file)


def _names(folder: Path) -> tuple[list[str], dict[str, Any] | None]:
    """The names of the files, and the index that lists them: safetensors before torch's, one file before several."""
    for whole, listed in ((WHOLE, INDEX), (pickled.WHOLE, pickled.INDEX)):
        if (folder / whole).exists():
            return [whole], None
        if (folder / listed).exists():
            index = _json(folder / listed)
            names = sorted(set(index.get("weight_map", {}).values()))
            suffix = Path(whole).suffix
            if wrong := [name for name in names if Path(name).name != name or not name.endswith(suffix)]:
                raise CheckpointError(f"{folder / listed} lists {wrong[0]!r}, which is no {suffix} file beside it")
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
            raise CheckpointError(f"the index of {folder} says that {key} is in {name}, and it is not")


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
