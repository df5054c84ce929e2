"""`nn.MultiheadAttention`: one weight that packs the projections of queries, keys and values."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from .linear import OPERATORS
from .reading import Reading

IN_PROJ = Reading(
    "in_proj",
    (nn.MultiheadAttention,),
    tuple(replace(operator, calls=()) for operator in OPERATORS),  # one function of torch's reads two weights
    weight="in_proj_weight",
    bias="in_proj_bias",
    along=("out_proj",),
)
