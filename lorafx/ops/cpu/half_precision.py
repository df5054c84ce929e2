"""Products in half precision by way of float32, on a CPU that has no instructions for half precision.

    A B  =  round(float32(A) float32(B))        float32 holds every number of bfloat16 and float16

Without such instructions torch multiplies number by number. On two cores with AVX2, for 1024 rows and 512 features in
and out in bfloat16, x Wᵀ takes 33 ms and dy W 430 ms; by way of float32 either takes 4 ms, all casts included. Kernels
for half precision add up in float32 as well, so a product differs only in the order of its sums, and a formula of
several products is rounded once, at its end. The float32 copies live as long as the formula runs. A compiler is given
the products as they are: it would keep the copies for backward.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..calls import is_plain
from ..dtypes import at_least_float32, is_half

_Formula = TypeVar("_Formula", bound=Callable[..., Any])
_SUPPORTED = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
_FEW = 4  # rows: for fewer, casting W takes longer than the product


def widened_where_slow(formula: _Formula) -> _Formula:
    """The formula, computed in float32 where that is faster for the rows of its first tensor.

    It is called with tensors and other things by position and gives a tensor, None, or a sequence of these. What it
    gives is rounded to the dtype of that first tensor.
    """

    @functools.wraps(formula)
    def run(*args: Any) -> Any:
        first = next(arg for arg in args if isinstance(arg, Tensor))
        if not pays(first):
            return formula(*args)
        with torch.autocast("cpu", enabled=False):  # which would cast the products to half precision
            found = formula(*map(at_least_float32, args))
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(first.dtype), found)

    return cast(_Formula, run)


def wide_where_slow(x: Tensor, *others: Any) -> tuple[Any, ...]:
    """x and the others, in float32 where products with the rows of x are faster so."""
    return tuple(map(at_least_float32, (x, *others))) if pays(x) else (x, *others)


def pays(x: Tensor) -> bool:
    """Whether products with the rows of x are faster in float32."""
    return is_slow(x) and is_plain(x) and math.prod(x.shape[:-1]) > _FEW


def is_slow(x: Tensor) -> bool:
    """Whether x is on a CPU that has no instructions for products in its dtype."""
    return is_half(x) and x.is_cpu and not multiplies(x.dtype)


@functools.cache  # the processor stays the same
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products in a dtype of half precision, by what oneDNN says."""
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, _SUPPORTED[dtype])())
