"""Adapters to and from PEFT's files: `adapter_config.json` and `adapter_model.safetensors` in a folder.

A key is `base_model.model.`, the module's path and the suffix that the kind gives (`.lora_A.weight`), without the
adapter's name. Reading checks everything before the model is changed; writing replaces a folder's files at once.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.config import AdapterConfig
from ..adapters.expert_names import without_routers
from ..adapters.kinds import config_of
from ..adapters.planning import plan
from ..adapters.site import Site
from ..adapters.slots import without_room
from ..adapters.start_values import completed
from ..adapters.tying import turned
from ..errors import CheckpointError, ConfigError, warn
from ..tree.lookup import given_by, tensor_at
from .apart import joined
from .disk import Content
from .folder import replace_folder
from .hub import Source
from .model_card import CARD, marked_card, new_card
from .pinned import interrupted
from .shards import content
from .written_config import unread_by_peft, without_trained_rows, written_config

CONFIG = "adapter_config.json"
WEIGHTS, OLD_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
SHARED_PREFIX = "base_model."  # of what all sites share, which PEFT keeps beside the model
# What a file's tensor must be: its shape, and whether it holds floats.
Expected = tuple[tuple[int, ...], bool]


@dataclass(frozen=True)
class Checkpoint:
    """An adapter as read from files: its config, and its tensors by PEFT's key."""

    folder: Path
    config: AdapterConfig
    tensors: Mapping[str, Tensor]


def keys(adapter: Adapter) -> dict[str, str]:
    """PEFT's key of each tensor that a file has of the adapter, mapped to the tensor's path, or to one of several."""
    named: dict[str, str] = {}
    for site in adapter.selection:
        module = _key_of_site(adapter, site)
        for name, spec in adapter.specs(site).items():
            if spec.saved:
                key = f"{SHARED_PREFIX if name in adapter.shared else f'{module}.'}{spec.suffix}"
                named.setdefault(key, adapter.tensors[site.name][spec.suffix])
    return named | {_key_of_copy(adapter, base): path for base, path in adapter.replaced.items()}


def _key_of_site(adapter: Adapter, site: Site) -> str:
    """PEFT's key of what its tensors are below: a module, or the wrapper of a parameter that a config names.

    PEFT wraps a module for each of these, so that the one that the module has last is outermost.
    """
    if site.is_parameter:
        wrapped = adapter.selection.parameters[site.module]
        return _key(adapter, site.module) + ".base_layer" * (len(wrapped) - 1 - wrapped.index(site))
    return f"{_key(adapter, site.module)}{site.name.removeprefix(site.module)}"


def _key_of_copy(adapter: Adapter, base: str) -> str:
    """PEFT's key of the adapter's own copy of a base tensor: the base's, or with what the kind calls whole modules."""
    whole, copy = adapter.kind.whole, adapter.replaced[base]
    below = f".{whole}.{adapter.name}."
    return PREFIX + copy.replace(below, f".{whole}.") if whole and below in copy else _key(adapter, base)


def without_repeats(root: nn.Module, adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors without those that PEFT writes more than once, if they are the same numbers.

    These are what all sites share, of some kinds, and tensors of a weight that is tied, of others.
    """
    again = repeats(root, adapter, tensors)
    for site in adapter.selection:
        own = _key(adapter, site.module)
        first = {f"{own}.{spec.suffix}": f"{SHARED_PREFIX}{spec.suffix}" for spec in adapter.shared.values()}
        for spec in adapter.kind.tensors(site, adapter.config).values():
            first |= {f"{_key(adapter, twin)}.{spec.suffix}": f"{own}.{spec.suffix}" for twin in site.tied}
        again |= {key: tensors[of] for key, of in first.items() if of in tensors}
    same = {key for key, value in again.items() if key in tensors and torch.equal(tensors[key], value)}
    return {key: tensor for key, tensor in tensors.items() if key not in same}


def repeats(root: nn.Module, adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What PEFT's files have once more for other modules of a tied weight, by key, as `tensors`, by key, has it."""
    again: dict[str, Tensor] = {}
    for site in adapter.selection:
        if adapter.kind.repeats(site, adapter.config):
            named = {name: f"{_key_of_site(adapter, site)}.{spec.suffix}" for name, spec in adapter.specs(site).items()}
            own = {name: tensors[key] for name, key in named.items() if key in tensors}
            found = turned(root, adapter.kind, adapter.config, site, own) if own.keys() == named.keys() else ()
            again |= {f"{_key(adapter, module)}.{suffix}": value for module, suffix, value in found}
    return again


def _key(adapter: Adapter, path: str) -> str:
    """PEFT's key of a module or base tensor: PEFT wraps adapted modules, and what they own is in a `base_layer`."""
    atoms, wrappers = path.split("."), adapter.selection.wrappers
    key = atoms[:1]
    for depth, atom in enumerate(atoms[1:], 1):
        key += [*["base_layer"] * wrappers[".".join(atoms[:depth])], atom]
    return PREFIX + ".".join(key)


def read(source: str | os.PathLike[str], *, weights_only: bool = False, **hub: Any) -> Checkpoint:
    """Read an adapter from a folder, or from the repository of that id on the Hub.

    `hub` is `subfolder`, and for a repository `revision`, `token`, `cache_dir`, `force_download` and
    `local_files_only`; only the adapter's own files are fetched. `weights_only=True` also takes an old
    `adapter_model.bin`, through torch's restricted unpickler. Raises `CheckpointError`, naming the file and the key,
    for whatever is missing, unreadable, of the wrong type or not finite, and `ConfigError` for other keywords.
    """
    folder = Source.of(source, **hub).folder((CONFIG,), (WEIGHTS, OLD_WEIGHTS))
    config = _read_config(folder / CONFIG)
    tensors = _read_tensors(folder, weights_only)
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise CheckpointError(f"{_weights_file(folder)}: {key} holds values that are not finite")
    return Checkpoint(folder, config, tensors)


def read_config(source: str | os.PathLike[str], **hub: Any) -> AdapterConfig:
    """Read an adapter's config alone; arguments and errors are those of `read`."""
    return _read_config(Source.of(source, **hub).folder((CONFIG,)) / CONFIG)


def check(checkpoint: Checkpoint, expected: Mapping[str, Expected], base: nn.Module) -> dict[str, Tensor]:
    """Compare a file with the tensors that a model's adapter needs, `expected` by key.

    Returns the base's embedding weights that were saved along (`save_embedding_layers`), by path. Raises
    `CheckpointError` for a missing or unexpected key, another shape, or integers for floats and the other way round.
    """
    file = _weights_file(checkpoint.folder)
    missing = [key for key in expected if key not in checkpoint.tensors]
    if missing:
        raise CheckpointError(f"{file} lacks {len(missing)} keys that the config asks for, such as {missing[0]}")
    extra = {key: tensor for key, tensor in checkpoint.tensors.items() if key not in expected}
    embeddings = {path: tensor for key, tensor in extra.items() if (path := _embedding_path(key, base))}
    unexpected = [key for key in extra if not _embedding_path(key, base) and _without_wrapper(key) not in expected]
    if unexpected:
        raise CheckpointError(f"{file} has {len(unexpected)} keys that no site of the model takes: {unexpected[0]}")
    for key, (shape, floating) in expected.items():
        found = checkpoint.tensors[key]
        _require_like(f"{file}: {key}", found, shape, floating, _rank_hint(checkpoint.config, shape, found))
    for path, tensor in embeddings.items():
        hint = "; call `resize_token_embeddings` on the base model first"
        _require_like(f"{file}: the saved {path}", tensor, tuple(tensor_at(base, path).shape), True, hint)
    return embeddings


def _require_like(what: str, found: Tensor, shape: tuple[int, ...], floating: bool, hint: str = "") -> None:
    if tuple(found.shape) != shape:
        raise CheckpointError(f"{what} is {tuple(found.shape)}, and the model needs {shape}{hint}")
    if found.is_floating_point() != floating:
        needed = "floating point" if floating else "integers"
        raise CheckpointError(f"{what} is {found.dtype}, and the model needs {needed}")


def _rank_hint(config: AdapterConfig, shape: tuple[int, ...], found: Tensor) -> str:
    """What to say of a shape that is another where the config's rank stands."""
    of_modules = (getattr(config, "rank_pattern", None) or {}).values()
    ranks = {getattr(config, "r", None), *(rank for rank in of_modules if isinstance(rank, int))}
    differing = [(wanted, size) for wanted, size in zip(shape, found.shape) if wanted != size]
    if len(shape) != found.dim() or not differing or any(wanted not in ranks for wanted, _ in differing):
        return ""
    wanted, size = differing[0]
    return f": the config's `r` (or `rank_pattern`) is {wanted} there, and the file's tensors are of r={size}"


def _without_wrapper(key: str) -> str:
    """The key without the atom of PEFT's wrapper around a saved module, or the key itself.

    With `bias="all"` PEFT writes the biases of such a module twice more, under names within its wrapper.
    """
    return re.sub(r"\.(modules_to_save(\.default)?|original_module)\.", ".", key, count=1)


def fit(
    root: nn.Module, name: str, found: Checkpoint, is_trainable: bool
) -> tuple[Adapter, dict[str, Tensor], dict[str, Tensor]]:
    """Match a file with a model, changing nothing: the adapter, its values by path, embedding weights by path.

    Raises `CheckpointError`, `ConfigError` or `SelectionError` where they do not fit.
    """
    config, tensors, parameters = joined(root, found.config, found.tensors)
    config = without_routers(root, without_trained_rows(root, config, tensors))
    try:
        adapter = plan(root, name, config.replace(inference_mode=not is_trainable).with_values())
    except ConfigError as error:
        raise type(error)(f"{found.folder / CONFIG}: {error}") from error
    found = replace(found, config=config, tensors=tensors | _by_key(adapter, parameters))
    expected: dict[str, Expected] = {
        adapter.tensors[site.name][spec.suffix]: (spec.shape, spec.dtype is None)
        for site in adapter.selection
        for spec in adapter.specs(site).values()
    }
    _warn_of_untied(found, repeats(root, adapter, found.tensors))
    whole = adapter.kind.unfiled(adapter.config, without_repeats(root, adapter, found.tensors))
    found = replace(found, tensors=whole)
    for base, path in adapter.replaced.items():
        tensor = tensor_at(root, base)
        expected[path] = tuple(tensor.shape), tensor.is_floating_point()
    named = keys(adapter)
    embeddings = check(found, {key: expected[path] for key, path in named.items()}, root)
    _require_one_value(found, named)
    values = completed(root, adapter, {path: found.tensors[key] for key, path in named.items()})
    return adapter, values, embeddings


def _by_key(adapter: Adapter, parameters: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of parameters, which are given by path and name, by PEFT's key."""
    return {
        f"{_key_of_site(adapter, site)}.{adapter.specs(site)[name].suffix}": tensor
        for site in adapter.selection
        for name, tensor in parameters.get(site.weight, {}).items()
    }


def _warn_of_untied(found: Checkpoint, again: Mapping[str, Tensor]) -> None:
    """Warn of a file that has an adapter for one of several tied modules, where this is one of them all."""
    if missing := [key for key in again if key not in found.tensors]:
        warn(
            f"{_weights_file(found.folder)} asks for `ensure_weight_tying`, and has no {missing[0]}: PEFT ties only "
            "what is called embed_tokens or lm_head, and here the adapter acts wherever the weight is read"
        )


def _require_one_value(found: Checkpoint, named: Mapping[str, str]) -> None:
    """Raise `CheckpointError` where modules whose weight is tied have one copy, and the file two."""
    first: dict[str, str] = {}
    for key, path in named.items():
        one, other = (found.tensors[each] for each in (first.setdefault(path, key), key))
        if one is not other and not torch.equal(one.double(), other.double()):  # torch compares no float8
            raise CheckpointError(
                f"{_weights_file(found.folder)}: {key} is not {first[path]}, and `ensure_weight_tying` makes them one"
            )


def gather(
    root: nn.Module, adapter: Adapter, base_weights: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors to write, by key: whole, on the CPU, which those that are there share with the tree. Where they are
    sharded, every process has to call this.

    `base_weights` are base tensors to save along, by path (embeddings). `values`, by path, are taken instead of the
    tree's.
    """
    paths = keys(adapter)
    whole = {path: _plain(values[path] if path in values else tensor_at(root, path)) for path in paths.values()}
    own = without_room(adapter, whole)
    tensors = {key: own[path].contiguous() for key, path in paths.items()}
    tensors |= {key: value.contiguous() for key, value in repeats(root, adapter, tensors).items()}
    return tensors | {_key(adapter, path): _plain(tensor) for path, tensor in base_weights.items()}


def write(root: nn.Module, adapter: Adapter, folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter to a folder, replacing the files of one that is there at once; `tensors` are those of `gather`.

    Raises `CheckpointError` for what the file system refuses.
    """
    config = written_config(root, adapter)
    for remark in unread_by_peft(root, adapter):
        warn(remark)
    files: dict[str, Content] = {
        # Only the options are sorted, not what they hold: the order of a `rank_pattern` has a meaning.
        CONFIG: (json.dumps(dict(sorted(config.items())), indent=2) + "\n").encode(),
        WEIGHTS: content(tensors, {"format": "pt"}),
    }
    if adapter.name == "default":
        files[CARD] = _card(folder / CARD, config)
    try:
        replace_folder(folder, files, obsolete=(OLD_WEIGHTS,))
    except OSError as error:
        raise CheckpointError(f"the adapter {adapter.name!r} could not be written to {folder}: {error}") from error


def _card(file: Path, config: Mapping[str, Any]) -> bytes:
    """The folder's model card: a new one, or the one that is there, marked as an adapter's."""
    if not file.is_file():
        return new_card(config).encode()
    try:
        return marked_card(file.read_text(encoding="utf-8"), config["base_model_name_or_path"]).encode()
    except (OSError, UnicodeDecodeError):  # it stays as it is
        return file.read_bytes()


def _read_config(file: Path) -> AdapterConfig:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        left = interrupted(file.parent)
        hint = f"a save was interrupted, its files are in {left}" if left else _what_is_there(file.parent)
        raise CheckpointError(f"{file} does not exist; {hint}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict) or "peft_type" not in values:
        raise CheckpointError(f"{file} does not say `peft_type`, so it is no adapter's config")
    try:
        return config_of({"peft_version": None, **values})
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def _what_is_there(folder: Path) -> str:
    """What a folder is that is no adapter's, in words."""
    if not folder.is_dir():
        return f"there is no folder {folder}"
    inner = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}"))
    if inner:
        return f"{folder} holds adapters in {', '.join(f'{name}/' for name in inner)}: pass one of these"
    return f"is {folder} an adapter's folder?"


def _weights_file(folder: Path) -> Path:
    old = folder / OLD_WEIGHTS
    return old if old.exists() and not (folder / WEIGHTS).exists() else folder / WEIGHTS


def _read_tensors(folder: Path, weights_only: bool) -> dict[str, Tensor]:
    file = _weights_file(folder)
    if file.name == OLD_WEIGHTS and not weights_only:
        raise CheckpointError(
            f"{file} is a pickle, which can run code when read; pass weights_only=True to read it through torch's "
            "restricted unpickler, then save it again as safetensors"
        )
    try:
        loaded = load_file(file) if file.name == WEIGHTS else torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} does not exist") from error
    except Exception as error:  # whatever a damaged file makes the two readers raise
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise CheckpointError(f"{file} holds a {type(loaded).__name__}, and no tensors by name")
    wrong = next((key for key, value in loaded.items() if not isinstance(value, Tensor)), None)
    if wrong is not None:
        raise CheckpointError(f"{file}: {wrong} is no tensor")
    return loaded


def _embedding_path(key: str, base: nn.Module) -> str | None:
    """Path of the base's embedding weight that a key stands for, or None."""
    path = base_path(key)
    return path if path in embedding_weights(base) else None


def base_path(key: str) -> str:
    """Path of the base's tensor that a key stands for, if it stands for one."""
    return key.removeprefix(PREFIX).replace(".base_layer.", ".")


def embedding_weights(base: nn.Module) -> tuple[str, ...]:
    """Paths of the parameters of input and output embeddings, for models that have transformers' getters for them."""
    layers = [given_by(base, getter) for getter in ("get_input_embeddings", "get_output_embeddings")]
    return tuple(
        f"{name}.{last}"
        for name, module in base.named_modules(remove_duplicate=False)
        if any(module is layer for layer in layers if layer is not None)
        for last in module._parameters
        if module._parameters[last] is not None
    )


def _plain(tensor: Tensor) -> Tensor:
    """A tensor as it is written: whole, contiguous, on the CPU."""
    if hasattr(tensor, "full_tensor"):  # a DTensor: every process has to call this
        tensor = tensor.full_tensor()  # type: ignore[operator]
    return tensor.detach().to("cpu").contiguous()
