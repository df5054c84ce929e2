"""merge: adapters onto a checkpoint on disk, tensor by tensor, without the model in memory.

    W' = round(W + ΔW)        as `merge_and_unload` does it

What is written is the base's checkpoint: the same files, the same tensors in them, and in some of these other numbers.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from ..errors import CheckpointError, ConfigError, warn
from ..files import checkpoint, shards
from ..files.base import CONFIG, INDEX, BaseFolder, read_base
from ..files.disk import write
from ..files.staging import Staging, require_free, staged

if TYPE_CHECKING:
    from .output import Output, Piece

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def merge(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """Merge adapters onto a base model's checkpoint on disk, and write the merged checkpoint to the folder `out`.

    `base` is a folder of safetensors or of torch's files (`.bin`), or the id of a repository on the Hub, at `revision`:
    the original checkpoint, also where the adapter was trained on a quantised one; of a quantised one what it has in
    floats can be merged into, as attention beside experts in MXFP4, and the rest is copied as it is. `token` is for
    the Hub, also for adapters. `adapter` is a folder in PEFT's format or an id, or several, which are merged in this
    order. Each weight is computed in float32 and rounded once, to the `dtype` that is given ("bfloat16",
    "float16" or "float32"), or else to the one that it is stored in. The files are the base's, as safetensors, with the
    same tensors in each; configs and tokenizer are copied.

    Memory is needed for the adapters and some rows of a weight, not for the model. `out` appears when it is whole; a
    call that was killed goes on where it was when it is made again. Returns `out`, absolute.

    Raises before anything is written: `CheckpointError` for a base or an adapter that cannot be read, for a weight that
    is stored quantised, for adapters that do not fit the base, and if `out` is there already; `ConfigError` and
    `SelectionError` as `lorafx.load` does; `MergeError` for a weight that cannot be merged into. While it writes,
    `CheckpointError` for what the file system refuses, and `MergeError` for numbers that do not fit `dtype`.
    """
    wide = _dtype(dtype)
    places = [adapter] if isinstance(adapter, (str, os.PathLike)) else list(adapter)
    if not places:
        raise ConfigError("there is no adapter to merge: give a folder or an id, or several")
    target = Path(out).resolve()
    require_free(target)
    source = read_base(base, revision, token)
    found = [checkpoint.read(place, token=token) for place in places]
    output = _planned(source, found, wide)
    others, left_out = source.others()
    if left_out:
        warn(f"not copied, being weights that are not merged: {', '.join(map(str, left_out))}")
    with staged(target, _note(source, found, wide, others)) as stage:
        _write_shards(stage, source, output)
        for file in others:
            _copy(stage, source.folder, str(file))
        _write_json(stage, source.folder, CONFIG, source.config, _config(output))
        if source.index is not None:
            _write_json(stage, source.folder, INDEX, source.index, _index(source.index, output))
    return target


def _planned(source: BaseFolder, found: Sequence[checkpoint.Checkpoint], wide: torch.dtype | None) -> Output:
    from .fitting import fitted  # with all that transformers' models import, which takes seconds
    from .output import Output

    return Output(source, fitted(source, found, wide), wide)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and name not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is none of {', '.join(DTYPES)}")
    return DTYPES.get(name)


def _write_shards(stage: Staging, base: BaseFolder, output: Output) -> None:
    """Write those of the safetensors files that an earlier call has not finished."""
    sizes = {
        name: shards.size({key: piece.entry for key, piece in pieces.items()}, base.shards[name].metadata)
        for name, pieces in output.files.items()
    }
    if missing := stage.missing_bytes(sizes):
        raise CheckpointError(f"there is no room for {stage.out}: the disk lacks {missing / 1e9:.1f} GB")
    done = {name for name, size in sizes.items() if stage.has(name, size)}
    with tqdm(
        desc="merging",
        total=sum(sizes.values()),
        initial=sum(sizes[name] for name in done),
        unit="B",
        unit_scale=True,
        disable=None,  # that is, where nobody watches: in a pipe or a log
    ) as bar:
        for name, pieces in output.files.items():
            if name not in done:
                stage.add(name, partial(_write_shard, base.shards[name].metadata, pieces, bar.update))


def _write_shard(
    metadata: Mapping[str, str] | None, pieces: Mapping[str, Piece], done: Callable[[int], object], file: Path
) -> None:
    entries = {key: piece.entry for key, piece in pieces.items()}
    shards.write(file, entries, metadata, lambda key: pieces[key].data(), done)


def _config(output: Output) -> dict[str, Any]:
    """The base's config, with what has changed: the dtype, whether embeddings are tied, the class."""
    config = copy.deepcopy(output.base.config)
    if output.dtype is not None:
        config.setdefault("dtype" if "torch_dtype" not in config else "torch_dtype", None)
        _set_dtype(config, str(output.dtype).removeprefix("torch."))
    if output.is_untied:
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            if part is config or "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
    cls = type(output.fitted.model).__name__
    if output.added and cls not in (config.get("architectures") or ()):
        config["architectures"] = [cls]
    return config


def _set_dtype(config: dict[str, Any], name: str) -> None:
    """Say the dtype where it is said, here and in the configs of a model's parts."""
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            config[key] = name
        elif isinstance(value, dict) and key != "quantization_config":
            _set_dtype(value, name)


def _index(index: Mapping[str, Any], output: Output) -> dict[str, Any]:
    """The index of the merged files: the base's, with tensors that were added and sizes as they are now."""
    metadata = dict(index.get("metadata") or {})
    pieces = [piece.entry for of_file in output.files.values() for piece in of_file.values()]
    if "total_size" in metadata:
        metadata["total_size"] += sum(e.nbytes for e in pieces) - sum(e.nbytes for e in output.entries.values())
    if "total_parameters" in metadata:
        metadata["total_parameters"] += sum(math.prod(piece.entry.shape) for piece in output.added.values())
    added = dict.fromkeys(output.added, max(output.files))
    return {**index, "metadata": metadata, "weight_map": index["weight_map"] | added}


def _write_json(stage: Staging, folder: Path, name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Write a JSON file as transformers does; where nothing has changed in one that is there, copy it as it is."""
    if now == before and (folder / name).exists():
        _copy(stage, folder, name)
    else:
        data = json.dumps(now, indent=2, sort_keys=True) + "\n"
        stage.add(name, partial(write, content=data.encode()))


def _copy(stage: Staging, folder: Path, name: str) -> None:
    stage.add(name, partial(write, content=(folder / name).read_bytes()))


def _note(
    base: BaseFolder, found: Sequence[checkpoint.Checkpoint], dtype: torch.dtype | None, others: Sequence[Path]
) -> str:
    """What a merged folder is made of, for who goes on with one that is not whole."""
    stats = {name: shard.file.stat() for name, shard in base.shards.items()}
    values = {
        "base": str(base.folder.resolve()),
        "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        "others": [str(file) for file in others],
        "config": base.config,
        "adapters": [_fingerprint(each) for each in found],
        "dtype": str(dtype),
    }
    return json.dumps(values, indent=2)


def _fingerprint(found: checkpoint.Checkpoint) -> str:
    digest = hashlib.sha256(repr(found.config).encode())
    for key in sorted(found.tensors):
        tensor = found.tensors[key]
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(shards.bytes_of(tensor))
    return digest.hexdigest()
