"""LoKr: a Kronecker product (Yeh et al., 2023, arXiv 2309.14859, section 3.2; Edalati et al., 2022, arXiv 2212.10650).

    ΔW = C ⊗ D          C (o₁, i₁), D (o₂, i₂ · kernel);  o₁ o₂ = out, i₁ i₂ = in
    x ΔWᵀ = C X Dᵀ      X (i₁, i₂) is x as a matrix, and the result (o₁, o₂): for a linear layer ΔW is never made

The sizes are near the square roots, or those nearest to `decompose_factor`. D is D_a D_b, of rank r, where that is
smaller, and C likewise with `decompose_both`. With `use_effective_conv2d` D is Σᵢⱼ Tᵢⱼₖ Aᵢₒ Bⱼₙ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import require, require_flags
from ..readings import CONV1D, LINEAR
from ..site import Site
from .kind import Operands, Spec
from .lora import rank
from .lycoris import Lycoris, LycorisConfig, core_shape, exact_product, has_core, kaiming, with_core

aten = torch.ops.aten


def _check(config: LoKrConfig) -> None:
    fits = isinstance(config.init_weights, bool) or config.init_weights == "lycoris"
    require(fits, "init_weights", config.init_weights, 'True, False or "lycoris"')
    require_flags(config, "decompose_both", "rank_dropout_scale")
    factor = config.decompose_factor
    fits = isinstance(factor, int) and not isinstance(factor, bool) and (factor == -1 or factor > 0)
    require(fits, "decompose_factor", factor, "a positive int, or -1")


@dataclass(frozen=True, kw_only=True)
class LoKrConfig(LycorisConfig):
    """What to adapt and how: the fields of `peft.LoKrConfig`, with its names and defaults."""

    peft_type: str = "LOKR"
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False

    checks = (*LycorisConfig.checks, _check)


class LoKr(Lycoris):
    """The LoKr kind; see the module's docstring for its equation."""

    config = LoKrConfig

    def update(self, x: Any, at: Operands) -> Any:
        if at.site.reading not in (LINEAR, CONV1D):
            return at.full(x, _change(at, aten.mm.default))
        (_, _), (i1, i2) = _sizes(at.site, at.config)
        hidden = aten.unflatten.int(x, -1, [i1, i2])
        for factor in [at.d] if "d" in at.tensors else [at.d_b, at.d_a]:
            hidden = aten.linear.default(hidden, factor)
        c = at.c if "c" in at.tensors else aten.mm.default(at.c_a, at.c_b)
        return aten.flatten.using_ints(aten.matmul.default(c, hidden), -2)

    def rescales(self, config: LoKrConfig) -> bool:
        return config.rank_dropout_scale

    def delta(self, name: str, at: Operands) -> Tensor:
        change = _change(at, exact_product)
        return (change.t() if at.site.reading.transposed else change) * at.scaling

    def tensors(self, site: Site, config: LoKrConfig) -> dict[str, Spec]:
        r, kernel = rank(site, config), site.weight_shape[2:]
        (o1, o2), (i1, i2) = _sizes(site, config)
        shapes: dict[str, tuple[int, ...]] = {"c": (o1, i1), "d": (o2, i2, *kernel)}
        if config.decompose_both and r < max(o1, i1) / 2:
            shapes = {"c_a": (o1, r), "c_b": (r, i1), "d": shapes["d"]}
        if r < max(o2, i2) / 2:
            del shapes["d"]
            if has_core(site, config):
                shapes |= {"t": core_shape(site, r), "d_a": (r, o2), "d_b": (r, i2)}
            else:
                shapes |= {"d_a": (o2, r), "d_b": (r, i2 * math.prod(kernel))}
        names = {"c": "w1", "c_a": "w1_a", "c_b": "w1_b", "d": "w2", "d_a": "w2_a", "d_b": "w2_b", "t": "t2"}
        return {name: Spec(f"lokr_{names[name]}", shape) for name, shape in shapes.items()}

    def init(
        self,
        site: Site,
        config: LoKrConfig,
        tensors: Mapping[str, Tensor],
        rng: torch.Generator | None,
        weight: Tensor | None,
    ) -> None:
        for tensor in tensors.values():
            kaiming(tensor, rng)
        zeros = ("d", "d_b") if config.init_weights == "lycoris" else ("c", "c_a") if config.init_weights else ()
        for name in zeros:
            if name in tensors:
                tensors[name].zero_()


def _sizes(site: Site, config: LoKrConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    """The sizes of C and D: (o₁, o₂), (i₁, i₂)."""
    factor = config.decompose_factor
    return _divided(site.out_features, factor), _divided(site.in_features // site.groups, factor)


def _divided(size: int, factor: int) -> tuple[int, int]:
    """A size as a product, the first number no larger than `factor`, if that is not -1, or exactly it where it can."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    first = next(n for n in range(most, 0, -1) if size % n == 0)
    return first, size // first


def _change(at: Operands, product: Any) -> Any:
    """ΔW in the dense weight's shape, or (out, in) where that is stored transposed; `product` multiplies factors."""
    site, c = at.site, at.c if "c" in at.tensors else product(at.c_a, at.c_b)
    shape = list(site.weight_shape[::-1] if site.reading.transposed else site.weight_shape)
    if "d" in at.tensors and len(shape) == 3:
        # PEFT's product of a matrix and a kernel of one dimension takes its axes from the right: its files mean that.
        made = aten.mul.Tensor(_wider(c, 0, 2, 4), _wider(at.d, 1, 3))
        return aten.reshape.default(made, shape)
    if "d" in at.tensors:
        d = aten.flatten.using_ints(at.d, 1)
    else:
        d = with_core(at.t, at.d_a, at.d_b) if "t" in at.tensors else product(at.d_a, at.d_b)
    made = aten.mul.Tensor(_wider(c, 1, 3), _wider(d, 0, 2))
    return aten.reshape.default(made, shape)


def _wider(tensor: Any, *dimensions: int) -> Any:
    """With new dimensions of size 1 at these places, in order."""
    for dimension in dimensions:
        tensor = aten.unsqueeze.default(tensor, dimension)
    return tensor
