"""Embeddings: rows of a weight (rows, features), looked up by number."""

from __future__ import annotations

import torch
from torch import nn

from .reading import Operator, Reading

aten = torch.ops.aten


def embedding(x, weight, padding_idx, scale_grad_by_freq, sparse):
    """(…,) of row numbers, (rows, features) -> (…, features)"""
    return aten.embedding.default(weight, x, padding_idx, scale_grad_by_freq, sparse)


def narrow(x, a, padding_idx, scale_grad_by_freq, sparse):
    """(…,) of row numbers, (r, rows) -> (…, r)"""
    return aten.embedding.default(aten.t.default(a), x, padding_idx, scale_grad_by_freq, sparse)


def wide(h, b):
    """(…, r), (features, r) -> (…, features)"""
    return aten.linear.default(h, b)


EMBEDDING = Reading(
    "embedding",
    (nn.Embedding,),
    (Operator(embedding, narrow, wide, transposed=True, lookup=True),),
)
