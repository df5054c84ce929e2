"""Convolutions of one, two and three dimensions, in groups or not: weights (out, in / groups, *kernel).

The narrow convolution has the layer's kernel size, stride, padding and dilation, the wide one, of kernel size 1, its
groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..low_rank import LowRank
from .reading import Operator, Reading, Shape

aten = torch.ops.aten


def convolution(op: Any, function: Any, padded: type, dims: int) -> Operator:
    """One overload of a convolution, (batch, in, …) -> (batch, out, …); its padding is a number, or a word (`str`)."""
    pointwise, ones, zeros = op.overloadpacket.default, [1] * dims, [0] * dims

    def conv(x, weight, bias, stride, padding, dilation, groups):
        return op(x, weight, bias, stride, padding, dilation, groups)

    def narrow(x, a, stride, padding, dilation):
        return op(x, a, None, stride, padding, dilation, 1)

    def wide(h, b, update_bias, groups):
        return pointwise(h, b, update_bias, ones, zeros, ones, groups)

    def called(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        numbers = [
            value if isinstance(value, (tuple, list, str)) else [value] * dims for value in (stride, padding, dilation)
        ]
        return (input, weight, bias, *numbers, groups) if isinstance(padding, str) == (padded is str) else None

    def full(x, w, stride, padding, dilation, groups):
        return op(x, w, None, stride, padding, dilation, groups)

    def channels(v):
        return aten.view.default(v, [-1, *ones])

    return Operator(conv, narrow, wide, full=full, inputs=channels, outputs=channels, calls=((function, called),))


@dataclass(frozen=True, repr=False)
class Convolution(Reading):
    """The reading of a convolution layer."""

    matrix: bool = False

    def features(self, shape: Shape, groups: int) -> tuple[int, int]:
        return shape[1] * groups, shape[0]

    def factors(self, shape: Shape, groups: int, rank: int) -> tuple[Shape, Shape]:
        inputs, outputs = self.features(shape, groups)
        return (rank, inputs, *shape[2:]), (outputs, rank // groups, *(1 for _ in shape[2:]))

    def product(self, a: Tensor, b: Tensor, shape: Shape) -> LowRank:
        return LowRank(b.flatten(1), a.flatten(1), shape)


def _layer(name: str, module: type[nn.Module], packet: Any, dims: int) -> Convolution:
    function = getattr(F, name)
    numbers, words = (packet.default, int), (packet.padding, str)
    return Convolution(name, (module,), tuple(convolution(op, function, kind, dims) for op, kind in (numbers, words)))


CONVOLUTIONS = (
    _layer("conv1d", nn.Conv1d, aten.conv1d, 1),
    _layer("conv2d", nn.Conv2d, aten.conv2d, 2),
    _layer("conv3d", nn.Conv3d, aten.conv3d, 3),
)
