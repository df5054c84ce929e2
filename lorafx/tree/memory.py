"""Memory: where that of a tensor begins, so that tensors are known that share it with a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from ..torch_private.tensors import is_wrapped
from .watched import PLAIN_TENSORS


def storage_of(tensor: Tensor) -> int:
    """Where a tensor's memory begins; 0 for a tensor that has none."""
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:  # sparse, say
        return 0


def whole_storage_of(tensor: Tensor) -> int:
    """Where a parameter's memory begins, if that is all its own, and no flat buffer of many."""
    if type(tensor) not in PLAIN_TENSORS or tensor.is_meta or tensor.layout != torch.strided:
        return 0
    if is_wrapped(tensor):  # by a transform of torch.func's
        return 0
    return storage_of(tensor) if tensor.untyped_storage().nbytes() == tensor.nbytes else 0
