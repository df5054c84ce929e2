"""Embeddings: rows of a weight (rows, features), looked up by number."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .reading import Operator, Reading

aten = torch.ops.aten
_CALLED = F.embedding


def embedding(x, weight, padding_idx, scale_grad_by_freq, sparse):
    """(…,) of row numbers, (rows, features) -> (…, features)"""
    return aten.embedding.default(weight, x, padding_idx, scale_grad_by_freq, sparse)


def called(input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False):
    if max_norm is not None:  # it writes to the weight
        return None
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    return input, weight, padding, scale_grad_by_freq, sparse


def forward_of_embedding(module, x):
    if F.embedding is not _CALLED:  # somebody has put another function there, which the module's forward calls
        return None
    options = module.padding_idx, module.max_norm, module.norm_type, module.scale_grad_by_freq, module.sparse
    return called(x, module.weight, *options)


def narrow(x, a, padding_idx, scale_grad_by_freq, sparse):
    """(…,) of row numbers, (r, rows) -> (…, r)"""
    return aten.embedding.default(aten.t.default(a), x, padding_idx, scale_grad_by_freq, sparse)


def wide(h, b):
    """(…, r), (features, r) -> (…, features)"""
    return aten.linear.default(h, b)


CALLS = ((F.embedding, called), (nn.Embedding.forward, forward_of_embedding))
EMBEDDING = Reading(
    "embedding",
    (nn.Embedding,),
    (Operator(embedding, narrow, wide, transposed=True, lookup=True, calls=CALLS),),
)
