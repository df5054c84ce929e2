"""Site forms: the operators a base weight may be read through, each as a pattern over ATen.

A form ties three things together: the module classes that own such a weight, the plain torch function that reads it
(the pattern a rule matches), and how the weight's shape spells `in_features` and `out_features`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

aten = torch.ops.aten


def linear(x, weight, bias):
    """(…, in), (out, in) -> (…, out)"""
    return aten.linear.default(x, weight, bias)


def linear_of_rows(x, weight, bias, start, end):
    """Some rows of a weight that packs several: (…, in), (out, in) -> (…, end - start)"""
    return aten.linear.default(x, aten.slice.Tensor(weight, 0, start, end), bias)


def addmm(x, weight, bias):
    """GPT-2's Conv1D, weight stored (in, out): (tokens, in), (in, out) -> (tokens, out)"""
    return aten.addmm.default(bias, x, weight)


def embedding(ids, weight, padding_idx, scale_grad_by_freq, sparse):
    """(…,) of row numbers, (rows, dim) -> (…, dim)"""
    return aten.embedding.default(weight, ids, padding_idx, scale_grad_by_freq, sparse)


def convolution(op: Callable[..., Any], dims: int) -> Callable[..., Any]:
    """The pattern of one convolution overload: (batch, in, …), (out, in/groups, …) -> (batch, out, …)"""

    def conv(x, weight, bias, stride, padding, dilation, groups):
        return op(x, weight, bias, stride, padding, dilation, groups)

    conv.op, conv.dims = op, dims  # type: ignore[attr-defined]  # a kind builds its equation on the same overload
    return conv


@dataclass(frozen=True)
class Form:
    """One way of reading a weight.

    `patterns` are alternatives; `modules` are the classes whose `weight` is read so, and `weight` and `bias` what they
    call it and its bias; `transposed` says that the weight is stored (in, out). `along` names children that are sites
    whenever their module is one.
    """

    name: str
    modules: tuple[type[nn.Module], ...]
    patterns: tuple[Callable[..., Any], ...]
    transposed: bool = False
    weight: str = "weight"
    bias: str = "bias"
    along: tuple[str, ...] = ()

    def features(self, module: nn.Module) -> tuple[int, int]:
        """(in_features, out_features) of a module of this form; an embedding reads one of `in` rows."""
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return module.in_channels, module.out_channels
        rows, columns = module.get_parameter(self.weight).shape
        return (rows, columns) if self.transposed else (columns, rows)

    def __repr__(self) -> str:
        return self.name


def _conv(name: str, module: type[nn.Module], packet: Any, dims: int) -> Form:
    return Form(name, (module,), (convolution(packet.default, dims), convolution(packet.padding, dims)))


LINEAR = Form("linear", (nn.Linear,), (linear, linear_of_rows))
IN_PROJ = Form(
    "in_proj",
    (nn.MultiheadAttention,),
    LINEAR.patterns,
    weight="in_proj_weight",
    bias="in_proj_bias",
    along=("out_proj",),
)
CONV1D = Form("addmm", (Conv1D,), (addmm,), transposed=True)
EMBEDDING = Form("embedding", (nn.Embedding,), (embedding,), transposed=True)
CONVOLUTIONS = (
    _conv("conv1d", nn.Conv1d, aten.conv1d, 1),
    _conv("conv2d", nn.Conv2d, aten.conv2d, 2),
    _conv("conv3d", nn.Conv3d, aten.conv3d, 3),
)
FORMS = (LINEAR, CONV1D, EMBEDDING, *CONVOLUTIONS, IN_PROJ)


def form_of(module: nn.Module) -> Form | None:
    """The form of a module that owns a weight of its own, or None."""
    own = (form for form in FORMS if isinstance(module._parameters.get(form.weight), nn.Parameter))
    return next((form for form in own if isinstance(module, form.modules)), None)
