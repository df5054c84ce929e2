"""wide: formulas of matrix products in half precision, by way of float32 on a CPU that has no instructions for them.

    A B  =  round(wide(A) wide(B))        float32 holds every number of bfloat16 and float16; one rounding, at the end

Without such instructions torch multiplies number by number. On two AVX2 cores, 1024 rows, 512 features in and out, in
bfloat16: x Wᵀ takes 33 ms and dy W 430 ms, and by way of float32 either takes 4 ms with all conversions. Kernels for
half precision add up in float32 too, so a product differs by the order of its sums alone; a formula of several products
is rounded less often. The wide copies are alive as long as the formula runs. A compiler is given the products as they
are: it would keep wide copies for backward.
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

_Formula = TypeVar("_Formula", bound=Callable[..., Any])
_SUPPORTED = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
_FEW = 4  # rows: for fewer, converting W takes longer than the product


def widened(formula: _Formula) -> _Formula:
    """The formula, in float32 where that is faster for the rows of its first tensor; what it gives is rounded back.

    It gets tensors and other things by position and gives a tensor, None, or a sequence of these.
    """

    @functools.wraps(formula)
    def run(*args: Any) -> Any:
        first = next(arg for arg in args if isinstance(arg, Tensor))
        if not pays(first):
            return formula(*args)
        with torch.autocast("cpu", enabled=False):  # or it would make half precision of what is wide
            found = formula(*map(wide, args))
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(first.dtype), found)

    return cast(_Formula, run)


def pays(x: Tensor) -> bool:
    """Whether products with the rows of x are faster in float32."""
    return is_slow(x) and is_plain(x) and math.prod(x.shape[:-1]) > _FEW


def is_half(x: Tensor) -> bool:
    """Whether x is of a half-precision dtype."""
    return x.dtype in _SUPPORTED


def is_slow(x: Tensor) -> bool:
    """Whether this machine has no instructions for products of x."""
    return is_half(x) and x.is_cpu and not multiplies(x.dtype)


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of a half-precision dtype fast, as oneDNN sees it."""
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, _SUPPORTED[dtype])())


def wide(value: Any) -> Any:
    """A tensor in half precision in float32; anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype in _SUPPORTED else value
