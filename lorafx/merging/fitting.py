"""The model of a checkpoint without its numbers, and adapters that fit it: on the meta device, at once and for nothing.

The class is that of the checkpoint's config. An adapter may have been trained on another class of the same
architecture, as a classifier on a language model's checkpoint: then it is that one. Of a class that is code of the
checkpoint's own there is a model by names alone (`by_names.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from ..adapters.adapter import Adapter
from ..adapters.config import AdapterConfig
from ..errors import CheckpointError, ConfigError, MergeError
from ..files.base import CONFIG, BaseFolder
from ..files.checkpoint import Checkpoint, fit
from ..files.shards import same_bytes
from ..torch_private.loading import Loading
from .by_names import by_names
from .changes import Values

# The classes for the tasks that PEFT knows, by config.
_TASKS = {
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "FEATURE_EXTRACTION": "MODEL_MAPPING",
}


@dataclass(frozen=True)
class Fitted:
    """A model on the meta device, what transformers loads into it from the checkpoint, and the adapters' values."""

    model: PreTrainedModel
    loading: Loading
    adapters: list[Values]


def fitted(base: BaseFolder, found: Sequence[Checkpoint], dtype: torch.dtype | None) -> Fitted:
    """The first class of model that all of these adapters fit; parameters are of `dtype`, or of torch's default one.

    Raises `CheckpointError` for a checkpoint of no class that transformers has and no code, and whatever makes the
    adapters unfit for the class that the checkpoint's config names.
    """
    unfit: Exception | None = None
    for model in _models(base, found, dtype):
        loading = Loading(model, base.entries)
        _untie(base, loading)
        names = ["default", *(f"adapter_{number}" for number in range(2, len(found) + 1))]
        try:
            fits = [fit(model, name, each, False) for name, each in zip(names, found)]
        except (CheckpointError, ConfigError) as error:
            unfit = unfit or error
        else:
            _require_whole_base(found, fits)
            return Fitted(model, loading, [Values(*each) for each in fits])
    raise unfit or CheckpointError(
        f"{base.folder / CONFIG} names no class of transformers ({base.config.get('architectures')}): load the model "
        "yourself, then lorafx.load, merge_and_unload, save_pretrained"
    )


def _require_whole_base(found: Sequence[Checkpoint], fits: Sequence[tuple[Adapter, Any, Any]]) -> None:
    """Raise `MergeError` for an adapter that belongs to what its start values left of the base, which no file has."""
    for checkpoint, (adapter, *_) in zip(found, fits):
        if adapter.takes_from_base:
            raise MergeError(
                f"{checkpoint.folder} took start values out of the base's weights, and the base's files still have "
                "them: load both (`lorafx.load`), then `merge_and_unload` and `save_pretrained`"
            )


def _models(base: BaseFolder, found: Sequence[Checkpoint], dtype: torch.dtype | None) -> Iterator[PreTrainedModel]:
    """The models that the checkpoint may be of: the last one of names alone, where it brings code, which is not run."""
    has_code = bool(base.config.get("auto_map"))
    try:
        for cls in _classes(base, found[0].config):
            yield _empty(base, cls, dtype)
    except CheckpointError:
        if not has_code:
            raise
    if has_code:
        yield by_names(base, found, dtype)


def _classes(base: BaseFolder, config: AdapterConfig) -> Iterator[type[PreTrainedModel]]:
    """The classes that the checkpoint may be meant for: its config's, the adapter's, that of the adapter's task."""
    named = [*(base.config.get("architectures") or ()), (config.auto_mapping or {}).get("base_model_class")]
    known: list[Any] = [getattr(transformers, name, None) for name in named if isinstance(name, str)]
    if config.task_type in _TASKS:
        of_task = getattr(transformers, _TASKS[config.task_type]).get(type(_config(base)), None)
        known += of_task if isinstance(of_task, tuple) else (of_task,)
    for cls in dict.fromkeys(known):
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
            yield cls


def _config(base: BaseFolder) -> Any:
    try:
        return AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
    except Exception as error:  # whatever a config makes its class raise
        raise CheckpointError(f"{base.folder / CONFIG} is no config that transformers can read: {error}") from error


def _empty(base: BaseFolder, cls: type[PreTrainedModel], dtype: torch.dtype | None) -> PreTrainedModel:
    config, before = _config(base), torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        with torch.device("meta"):
            return cls(config)
    except Exception as error:  # whatever a config makes a model raise
        raise CheckpointError(f"{base.folder / CONFIG} makes no {cls.__name__}: {error}") from error
    finally:
        torch.set_default_dtype(before)


def _untie(base: BaseFolder, loading: Loading) -> None:
    """Take apart what the config ties and the checkpoint has twice, with other numbers: transformers loads it so."""
    model, keys = loading.model, {name: key for key, name in loading.names.items()}
    for name, other in model.all_tied_weights_keys.items():
        if name in keys and other in keys:
            one, two = base.shard_of(keys[name]), base.shard_of(keys[other])
            if not same_bytes(one, keys[name], two, keys[other]):
                owner, _, last = name.rpartition(".")
                tensor = model.get_parameter(name)
                setattr(model.get_submodule(owner), last, nn.Parameter(torch.empty_like(tensor)))
