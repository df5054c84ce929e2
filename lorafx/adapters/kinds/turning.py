"""What kinds that turn features have in common: OFT, BOFT and HRA.

    y = (x R) Wᵀ + b = x (W Rᵀ)ᵀ + b        R (in, in)

So x is turned, which costs less than to turn W. A convolution with a kernel reads each feature at several places, and R
turns all columns of its weight, (in · kernel, in · kernel), for which x has no room: there ΔW = W Rᵀ - W is made. (In
PEFT, OFT turns patches of x instead and adds up where they overlap, so that R = I changes the model, and merging does.)
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ...errors import ConfigError
from ..site import Site
from .kind import Kind, Operands

aten = torch.ops.aten


class Turning(Kind):
    """A kind that turns features; a subclass has its `turned`."""

    def turned(self, x: Any, at: Operands, transposed: bool = False) -> Any:
        """x R of x (…, columns), or x Rᵀ."""
        raise NotImplementedError

    def needs_weight(self, site: Site) -> bool:
        return has_kernel(site)

    def before(self, x: Any, at: Operands) -> Any:
        return x if has_kernel(at.site) else _back(self.turned(_last(x, at.site), at), at.site)

    def after(self, y: Any, x: Any, at: Operands) -> Any:
        if not has_kernel(at.site):
            return y
        matrix = at.matrix(at.weight)
        change = aten.sub.Tensor(self.turned(matrix, at, transposed=True), matrix)
        return aten.add.Tensor(y, at.full(x, aten.view.default(change, at.site.weight_shape)))


def has_kernel(site: Site) -> bool:
    """Whether the layer reads several places at once."""
    return math.prod(site.weight_shape[2:]) > 1


def columns(site: Site) -> int:
    """How many columns the weight has as a matrix, which are turned: in, or in · kernel."""
    return site.in_features * math.prod(site.weight_shape[2:])


def require_turnable(site: Site, kind: str, lookups: bool = False) -> None:
    """Raise `ConfigError` for a convolution in groups, which has a weight of fewer columns, or an embedding."""
    if site.groups > 1 or (site.reading.lookup and not lookups):
        what = "an embedding" if site.reading.lookup else f"a convolution of {site.groups} groups"
        raise ConfigError(f"{site.name} is {what}, for which there is no {kind}; exclude it")


def _last(x: Any, site: Site) -> Any:
    """x with its features, which a convolution has in another dimension, as the last one."""
    spatial = len(site.weight_shape) - 2
    return aten.movedim.int(x, -1 - spatial, -1) if spatial else x


def _back(x: Any, site: Site) -> Any:
    """The inverse of `_last`."""
    spatial = len(site.weight_shape) - 2
    return aten.movedim.int(x, -1, -1 - spatial) if spatial else x
