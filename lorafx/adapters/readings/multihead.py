"""`nn.MultiheadAttention`: one weight that packs the projections of queries, keys and values."""

from __future__ import annotations

from torch import nn

from .linear import OPERATORS
from .reading import Reading

IN_PROJ = Reading(
    "in_proj",
    (nn.MultiheadAttention,),
    OPERATORS,
    weight="in_proj_weight",
    bias="in_proj_bias",
    along=("out_proj",),
)
