"""What commands work on: a base with an adapter, and a call of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from ..api import compile, load
from ..errors import CheckpointError
from ..model.adapted_model import AdaptedModel

_LENGTH = 9  # of a sequence, and less than any model's
_IMAGE = 64  # of a model that takes any size, as convolutional ones do


def base_of(source: str) -> PreTrainedModel:
    """The model of a checkpoint, of the class that its config names; `CheckpointError` if transformers has none."""
    try:
        config = AutoConfig.from_pretrained(source)
        names = config.architectures or ()
        classes: list[Any] = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
        if not classes:
            raise CheckpointError(f"{source}: its config names no class of transformers ({', '.join(names) or 'none'})")
        return classes[0].from_pretrained(source)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source}: {error}") from error


def is_config(adapter: str) -> bool:
    """Whether an adapter is given by a config alone, the path of a JSON file."""
    return adapter.endswith(".json") and Path(adapter).is_file()


def adapted(base: PreTrainedModel, adapter: str, **options: Any) -> AdaptedModel:
    """The base with an adapter: one of a folder or Hub id, or a new one of a config. `options` are `compile`'s."""
    if is_config(adapter):
        return compile(base, json.loads(Path(adapter).read_text("utf-8")), **options)
    return load(base, adapter, **options)


def example_call(model: Any, batch: int = 2, length: int = _LENGTH) -> dict[str, Tensor]:
    """Arguments of a call at random, (batch, length) of them: token ids, pixels or sound, as the model takes.

    Raises `CheckpointError` for a model that takes something else.
    """
    name, config = model.main_input_name, model.config
    ids = torch.randint(getattr(config.get_text_config(), "vocab_size", 1), (batch, length))
    decoder = {"decoder_input_ids": ids.clone()} if config.is_encoder_decoder else {}
    if name == "input_ids":
        return {name: ids} | decoder
    if name == "pixel_values":
        size, channels = getattr(config, "image_size", _IMAGE), getattr(config, "num_channels", 3)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return {name: torch.randn(batch, channels, height, width)} | decoder
    if name == "input_features" and hasattr(config, "max_source_positions"):  # Whisper takes this length alone
        return {name: torch.randn(batch, config.num_mel_bins, 2 * config.max_source_positions)} | decoder
    raise CheckpointError(
        f"{type(model).__name__} takes `{name}`, of which this command makes no example; "
        "use `lorafx.testing` or `show` of the adapted model in a script"
    )
