"""Products with a small matrix for each expert, for adapters of weights that stack those of all experts.

PEFT keeps the factors of E experts in two matrices: A (r E, in) has each expert's rows together, B (out, r E) has its
columns E apart. `factors_in` and `factors_out` give them as (E, in, r) and (E, r, out). `grouped_mm` is aten's product
of rows that are sorted by expert, without its demand that rows are a multiple of 16 bytes long, which ranks seldom are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .library import composite

_ALIGNMENT = 16  # bytes


def factors_in(a: Tensor, like: Tensor) -> Tensor:
    """A (r E, in) as (E, in, r); the first size of `like` is E."""
    return a.unflatten(0, (like.shape[0], -1)).transpose(1, 2)


def factors_out(b: Tensor, like: Tensor) -> Tensor:
    """B (out, r E) as (E, r, out); the first size of `like` is E."""
    return b.unflatten(1, (-1, like.shape[0])).permute(2, 1, 0)


def grouped_mm(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """Each row of x by its expert's matrix: (rows, in), (E, in, out) -> (rows, out).

    The rows of expert e end before row `offs[e]`, of int32. x and `weight` have one dtype: float32 or half precision.
    """
    outputs, per = weight.shape[-1], _ALIGNMENT // x.dtype.itemsize
    inward, outward = -weight.shape[1] % per, -outputs % per
    x = F.pad(x, (0, inward)).contiguous()
    weight = F.pad(weight, (0, outward, 0, inward)).contiguous()
    return torch.ops.aten._grouped_mm.default(x, weight, offs)[:, :outputs]


composite("expert_factors_in(Tensor a, Tensor like) -> Tensor", factors_in)
composite("expert_factors_out(Tensor b, Tensor like) -> Tensor", factors_out)
composite("grouped_mm(Tensor x, Tensor weight, Tensor offs) -> Tensor", grouped_mm)
