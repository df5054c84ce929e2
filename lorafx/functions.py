"""Functions of PEFT's that take a model with adapters. Each calls the method of the model that does it here.

They take what somebody has put around an adapted model, too, as `torch.compile(lora)`. All raise `AdapterError` for a
model that is not adapted.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from .adapters.config import AdapterConfig
from .model.adaptation import Adaptation, of
from .model.like_peft import LayerStatus, ModelStatus
from .tree.wrappers import innermost


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """PEFT's `peft.utils.hotswap.hotswap_adapter`: an adapter takes the values in a folder or Hub id, in place.

    See `hotswap_adapter` of an adapted model, which has these arguments and errors.
    """
    _of(model).hotswap_adapter(model_name_or_path, adapter_name, torch_device, **kwargs)  # type: ignore[arg-type]


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: AdapterConfig | Mapping[str, Any] | Any | None = None,
    check_compiled: str = "error",
) -> None:
    """PEFT's function of `peft.utils.hotswap`: give the adapters room for others that will be swapped in.

    In PEFT `config` has its ranks changed; here it says which sites others will adapt, and stays as it is. See
    `prepare_for_hotswap` of an adapted model, which has these arguments and errors.
    """
    _of(model).prepare_for_hotswap(target_rank, config, check_compiled)


def get_layer_status(model: nn.Module) -> list[LayerStatus]:
    """PEFT's function: of each adapted module its adapters, which of them act, train and are merged, and where."""
    return _of(model).get_layer_status()


def get_model_status(model: nn.Module) -> ModelStatus:
    """PEFT's function: the same of the model as a whole, with its numbers of parameters."""
    return _of(model).get_model_status()


def rescale_adapter_scale(model: nn.Module, multiplier: float) -> AbstractContextManager[None]:
    """PEFT's `peft.helpers.rescale_adapter_scale`: multiply the scales of active adapters within a `with` block."""
    return _of(model).rescale(multiplier)


def _of(model: nn.Module) -> Adaptation:
    return of(innermost(model))
