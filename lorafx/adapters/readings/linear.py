"""Linear layers: `nn.Linear`, with the weight stored (out, in), and GPT-2's `Conv1D`, which stores it (in, out)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .reading import Operator, Reading
from .value import VALUE_OF_MATRIX

aten = torch.ops.aten
_CALLED, _CALLED_BY_CONV1D = F.linear, torch.addmm


def linear(x, weight, bias):
    """(…, in), (out, in) -> (…, out)"""
    return aten.linear.default(x, weight, bias)


def called_linear(input, weight, bias=None):
    return input, weight, bias


def forward_of_linear(module, x):
    if F.linear is not _CALLED:  # somebody has put another function there, which the module's forward calls
        return None
    own = module._parameters  # a short way to them, for sites are many
    if "weight" in own and "bias" in own:
        return x, own["weight"], own["bias"]
    return x, module.weight, module.bias


def narrow(x, a):
    """(…, in), (r, in) -> (…, r)"""
    return aten.linear.default(x, a)


def wide(h, b, update_bias):
    """(…, r), (out, r) -> (…, out)"""
    return aten.linear.default(h, b, update_bias)


def linear_of_rows(x, weight, bias, start, end):
    """Some rows of a weight that packs several: (…, in), (out, in) -> (…, end - start)."""
    return aten.linear.default(x, aten.slice.Tensor(weight, 0, start, end), bias)


def wide_of_rows(h, b, update_bias, start, end):
    """(…, r), (out, r) -> (…, end - start)"""
    return aten.linear.default(h, aten.slice.Tensor(b, 0, start, end), update_bias)


def full_of_rows(x, w, start, end):
    """(…, in), (out, in) -> (…, end - start)"""
    return aten.linear.default(x, aten.slice.Tensor(w, 0, start, end))


def outputs_of_rows(v, start, end):
    """(out,) -> (end - start,)"""
    return aten.slice.Tensor(v, 0, start, end)


def linear_of_cast(x, weight, bias, weight_dtype):
    """(…, in), (out, in) -> (…, out), in the dtype that the weight is cast to."""
    return aten.linear.default(x, aten.to.dtype(weight, weight_dtype), bias)


def full_of_cast(x, w, weight_dtype):
    """(…, in), (out, in) -> (…, out)"""
    return aten.linear.default(x, aten.to.dtype(w, weight_dtype))


def turned_linear(x, weight, bias):
    """(…, in), (in, out) -> (…, out)"""
    return aten.linear.default(x, aten.t.default(weight), bias)


def forward_of_conv1d(module, x):
    return (x, module.weight, module.bias) if torch.addmm is _CALLED_BY_CONV1D else None


def addmm(x, weight, bias):
    """(tokens, in), (in, out) -> (tokens, out)"""
    return aten.addmm.default(bias, x, weight)


def called_addmm(input, mat1, mat2, *, beta=1, alpha=1, out=None):
    return (mat1, mat2, input) if beta == alpha == 1 and out is None else None


OPERATORS = (
    Operator(linear, narrow, wide, calls=((F.linear, called_linear), (nn.Linear.forward, forward_of_linear))),
    Operator(linear_of_rows, narrow, wide_of_rows, full=full_of_rows, outputs=outputs_of_rows),
    Operator(linear_of_cast, narrow, wide, full=full_of_cast),
)
LINEAR = Reading("linear", (nn.Linear,), OPERATORS, value=VALUE_OF_MATRIX)
TURNED_LINEAR = Operator(
    turned_linear, narrow, wide, transposed=True, calls=((Conv1D.forward, forward_of_conv1d),)
)  # as which a graph has a Conv1D, once `restore_linear` has been there
ADDMM = Operator(addmm, narrow, wide, transposed=True, calls=((torch.addmm, called_addmm),))
CONV1D = Reading("addmm", (Conv1D,), (TURNED_LINEAR, ADDMM))
