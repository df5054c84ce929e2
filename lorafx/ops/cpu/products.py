"""Products of matrices by whichever of torch's libraries multiplies faster on this processor.

    linear(x, W, b) = x Wᵀ + b        matmul(X, Y, s) = s · X Y        over_rows(X, Y, s) = s · Xᵀ Y

torch gives products in float32 to MKL, which uses AVX-512 on Intel's processors alone. oneDNN, which torch has for half
precision, uses it on others too: on two cores of an AMD EPYC (1024, 512) by (512, 512) takes 2.6 ms by MKL and 1.2 ms
by oneDNN. With AVX2 they are equally fast. The two add up in different orders. Autograd knows no derivative of oneDNN's
product, so it is used within autograd functions, and where nobody takes a derivative.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import flop_registry, register_flop_formula

from ...torch_private.tensors import is_mkldnn_enabled
from ..calls import is_plain, needs_backward
from ..dtypes import is_half
from ..library import LIBRARY

_LEAST = 2**21  # multiplications, below which a call of oneDNN takes longer than all of MKL's


def onednn_pays(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN multiplies x (…, in) by `weight` (out, in), transposed, faster than what torch would use."""
    return (
        mkl_leaves_avx512()
        and not torch.jit.is_tracing()
        and x.dtype == weight.dtype == torch.float32
        and x.is_cpu
        and is_plain(x)
        and is_plain(weight)
        and x.layout == weight.layout == torch.strided
        and weight.ndim == 2
        and x.shape[-1] == weight.shape[1]
        and x.numel() * weight.shape[0] >= _LEAST
        and not torch.is_autocast_enabled("cpu")  # under which torch multiplies them in half precision
        and is_mkldnn_enabled()
    )


def is_plain_bias(bias: Tensor | None, weight: Tensor) -> bool:
    """Whether a bias is None or one number for each of `weight`'s rows. Other shapes torch broadcasts."""
    return bias is None or (bias.shape == weight.shape[:1] and bias.dtype == weight.dtype)


def product_pays(left: Tensor, multiplications: int) -> bool:
    """Whether `torch.ops.lorafx.product` is faster than ATen's in a compiled graph, for a left factor like this."""
    return mkl_leaves_avx512() and left.dtype == torch.float32 and left.is_cpu and multiplications >= _LEAST


def choices() -> tuple[Any, ...]:
    """What `product_pays` goes by: code that was compiled with other choices is not for this process."""
    return mkl_leaves_avx512(), _LEAST


@functools.cache  # the processor stays the same
def mkl_leaves_avx512() -> bool:
    """Whether this processor has AVX-512 and MKL does not use it."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    processor = torch.cpu.get_capabilities()
    name = processor.get("cpu_name", "")
    return bool(processor.get("avx512_f") and name) and "intel" not in name.lower()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (…, in) by `weight` (out, in), transposed, plus `bias` (out)."""
    if onednn_pays(x, weight) and is_plain_bias(bias, weight) and not needs_backward(x, weight, bias):
        bias = None if bias is None else bias.contiguous()  # oneDNN reads it as if it had no gaps
        # A matrix and its transpose are equally fast; one with gaps between its rows is hundreds of times slower.
        weight = weight if weight.is_contiguous() or weight.t().is_contiguous() else weight.contiguous()
        return torch.ops.mkldnn._linear_pointwise.default(x.contiguous(), weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def matmul(left: Tensor, right: Tensor, scaling: float = 1.0) -> Tensor:
    """left (…, k) by right (k, n), times `scaling`. Of matrices, both are one kernel."""
    if scaling == 1.0:
        return linear(left, right.t()) if _pays(left, right) else left @ right
    if left.ndim != 2 or right.shape[0] == 0 or _pays(left, right):
        return matmul(left, right) * scaling
    if is_plain(left):
        return left.new_empty(left.shape[0], right.shape[1]).addmm_(left, right, beta=0, alpha=scaling)
    # A compiler finds the memory itself. With beta = 0 the row adds nothing: addmm is to be given something.
    return torch.addmm(right[:1], left, right, beta=0, alpha=scaling)


def over_rows(left: Tensor, right: Tensor, scaling: float = 1.0) -> Tensor:
    """scaling · leftᵀ right of left (T, m) and right (T, n): rows' outer products, added up."""
    if left.shape[1] > right.shape[1] and (_pays(right.t(), left) or _is_onednns(right)):
        return matmul(right.t(), left, scaling).t()  # by oneDNN a quarter faster than the other way round
    return matmul(left.t(), right, scaling)


def _pays(left: Tensor, right: Tensor) -> bool:
    """`onednn_pays` of left (…, k) by right (k, n)."""
    return mkl_leaves_avx512() and onednn_pays(left, right.t())


def _is_onednns(tensor: Tensor) -> bool:
    """Whether torch gives products of a tensor to oneDNN by itself."""
    return tensor.is_cpu and is_half(tensor) and is_plain(tensor)


def accumulated(own: Tensor, left: Tensor, right: Tensor, scaling: float = 1.0) -> Tensor:
    """own + scaling · left @ right of matrices, in the memory of `own`, unless a second derivative is to be taken."""
    if torch.is_grad_enabled():
        return torch.addmm(own, left, right, alpha=scaling)
    if _pays(left, right):
        return own.add_(matmul(left, right), alpha=scaling)
    return own.addmm_(left, right, alpha=scaling)


def add_over_rows(total: Tensor, left: Tensor, right: Tensor, scaling: float = 1.0) -> None:
    """Add scaling · leftᵀ right, of left (T, m) and right (T, n), to `total` (m, n), which may be of a wider dtype."""
    if total.dtype == left.dtype and not _pays(right.t(), left):
        total.addmm_(left.t(), right, alpha=scaling)
    else:
        total.add_(over_rows(left, right), alpha=scaling)


def product_with_update(
    left: Tensor, right: Tensor, hidden: Tensor, update: Tensor, bias: Tensor | None = None, scaling: float = 1.0
) -> Tensor:
    """left @ right + bias + scaling · hidden @ update, of (m, k), (k, n), (m, r), (r, n) and (n,).

    The narrow product is written first and the wide one, which reads and writes far less for each multiplication, is
    added in the same memory: a pass less than the other way round. It is the other way round by oneDNN, which adds to
    nothing that is there.
    """
    if _pays(left, right):
        return linear(left, right.t(), bias).addmm_(hidden, update, alpha=scaling)
    if bias is None:
        return (hidden @ update).addmm_(left, right, beta=scaling)
    return torch.addmm(bias, hidden, update, alpha=scaling).addmm_(left, right)


def _product(left: Tensor, right: Tensor) -> Tensor:
    if left.is_contiguous():
        return matmul(left, right)
    return over_rows(left.t(), right).contiguous()


def _empty(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1])


def _flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


def _product_flops(left: Any, right: Any, **_: Any) -> int:
    return 2 * math.prod(left) * right[1]


# left @ right of matrices for compiled graphs: compilers do not look into it, and it has no derivative.
LIBRARY.define("product(Tensor left, Tensor right) -> Tensor", tags=(torch.Tag.flexible_layout,))
LIBRARY.impl("product", _product, "CompositeExplicitAutograd")
torch.library.register_fake("lorafx::product", _empty, lib=LIBRARY)
register_flop_formula(torch.ops.lorafx.product)(_product_flops)
# Without a formula torch's counter counts no multiplications. Some builds of torch have no oneDNN.
if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._linear_pointwise not in flop_registry:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_flops)
