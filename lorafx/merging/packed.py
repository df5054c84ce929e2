"""Which tensors of a checkpoint that is stored quantised are numbers like any, and may be changed.

Seldom are all weights quantised: GPT-OSS has its experts in MXFP4, two tensors of bytes for each, and all else in
bfloat16. What is packed is copied as it is, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ..errors import CheckpointError
from ..files.base import BaseFolder
from ..torch_private.loading import Loading
from .changes import Change

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (*FLOATS, torch.int64, torch.bool)  # of positions and the like, in models that nobody has quantised


def dense_keys(base: BaseFolder, loading: Loading) -> set[str]:
    """The keys of a quantised checkpoint whose tensors are weights as they stand.

    Each is floats in the model's shape, in a module for which the checkpoint has nothing but the model's own tensors:
    scales and the like are none of these. Where nothing is packed, layers round their floats when they run, and which
    do so is not in the files: then there are none.
    """
    entries = base.entries
    if all(entry.torch_dtype in _PLAIN for entry in entries.values()):
        return set()
    foreign = set(_owners(key for key in entries if key not in loading.names))
    return {
        key
        for key, name in loading.names.items()
        if entries[key].torch_dtype in FLOATS
        and entries[key].shape == tuple(loading.own[name].shape)
        and key.rpartition(".")[0] not in foreign
    }


def _owners(keys: Iterable[str]) -> Iterable[str]:
    """Every path above some keys."""
    for key in keys:
        while key:
            key = key.rpartition(".")[0]
            yield key


def require_dense(
    base: BaseFolder, names: Mapping[str, str], changes: Mapping[str, Change], dense: Iterable[str]
) -> None:
    """Raise `CheckpointError` for a tensor of the model that is to change, and is none of those at `dense` keys.

    `names` has the model's names by key. What is tied has one change, and is there once.
    """
    there = {id(changes[names[key]]) for key in dense if names[key] in changes}
    for name, change in changes.items():
        if id(change) not in there:
            raise CheckpointError(
                f"{base.folder} is stored quantised ({base.quantised}), {name} as well: merging into that would round "
                "a second time. Give the original checkpoint, which the adapter can be merged onto just as well; where "
                "there is none, load it dequantised (`dequantize=True` of its quantisation config), save that, and "
                "give what was saved"
            )
