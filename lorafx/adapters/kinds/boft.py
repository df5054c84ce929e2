"""BOFT: features turned by sparse factors, as in a butterfly (Liu et al., 2024, arXiv 2311.06243, section 3.2).

    y = s ∘ ((x B_m … B_1) Wᵀ) + b         W' = diag(s) W (B_m … B_1)ᵀ,   B_i = P_i diag(R_i1, …, R_in) P_iᵀ

Each R is (I - Q) (I + Q)⁻¹ of a skew-symmetric Q, (size, size); P_i puts every other half of a block first, within 2ⁱ⁻¹
blocks, so that with each factor a feature meets twice as many. Files have matrices A with Q = (A - Aᵀ) / 2,
(m, blocks, size, size), which start as zeros, and s, (out, 1), or (1, out) of a convolution, as ones. In training
`boft_dropout` leaves that share of the blocks of one factor out. PEFT 0.21 makes one factor of any number where it has
not compiled its kernels for CUDA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...ops import orthogonal as _operators  # noqa: F401, defines them
from ..config import AdapterConfig, require_bias, require_counts, require_dropouts, require_flags, require_naturals
from ..site import Site
from .kind import Operands, Spec
from .turning import Turning, columns, require_turnable

aten = torch.ops.aten


def _check(config: BOFTConfig) -> None:
    require_naturals(config, "boft_block_size", "boft_block_num")
    if (config.boft_block_size == 0) == (config.boft_block_num == 0):
        raise ConfigError("one of `boft_block_size` and `boft_block_num` must be 0: the other says both")
    require_counts(config, "boft_n_butterfly_factor")
    require_dropouts(config, "boft_dropout")
    require_flags(config, "fan_in_fan_out", "init_weights")
    require_bias(config, "boft_only")


@dataclass(frozen=True, kw_only=True)
class BOFTConfig(AdapterConfig):
    """What to adapt and how: the fields of `peft.BOFTConfig`, with its names and defaults."""

    peft_type: str = "BOFT"
    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True

    checks = (_check,)


class Boft(Turning):
    """The BOFT kind; see the module's docstring for its equation."""

    config = BOFTConfig

    def turned(self, x: Any, at: Operands, transposed: bool = False) -> Any:
        turns = _dropped(_turns(at), at) if at.training and at.config.boft_dropout else _turns(at)
        turns = aten.transpose.int(turns, -1, -2) if transposed else turns
        factors = range(at.config.boft_n_butterfly_factor)
        for i in factors if transposed else reversed(factors):
            x = _turned(x, aten.select.int(turns, 0, i), i, at)
        return x

    def after(self, y: Any, x: Any, at: Operands) -> Any:
        y = super().after(y, x, at)
        gain, bias = at.outputs(aten.view.default(at.s, [-1])), at.bound.get("bias")
        if bias is None:
            return aten.mul.Tensor(y, gain)
        change = aten.mul.Tensor(aten.sub.Tensor(y, at.outputs(bias)), aten.sub.Tensor(gain, 1))
        return aten.add.Tensor(y, change)

    def merged(self, name: str, base: Tensor, at: Operands) -> Tensor:
        return at.like_weight(self.turned(at.matrix(base), at, transposed=True) * at.s.view(-1, 1))

    def unmerged(self, name: str, merged: Tensor, at: Operands) -> Tensor:
        return at.like_weight(self.turned(at.matrix(merged) / at.s.view(-1, 1), at))

    def tensors(self, site: Site, config: BOFTConfig) -> dict[str, Spec]:
        count, size = _blocks(site, config)
        gains = (1, site.out_features) if len(site.weight_shape) > 2 else (site.out_features, 1)
        return {
            "a": Spec("boft_R", (config.boft_n_butterfly_factor, count, size, size), as_kept=True),
            "s": Spec("boft_s", gains, as_kept=True),
        }

    def init(
        self,
        site: Site,
        config: BOFTConfig,
        tensors: Mapping[str, Tensor],
        rng: torch.Generator | None,
        weight: Tensor | None,
    ) -> None:
        if config.init_weights:
            tensors["a"].zero_()
            tensors["s"].fill_(1)
        else:
            tensors["a"].normal_(std=0.1, generator=rng)
            tensors["s"].normal_(1, 0.1, generator=rng)

    def check(self, site: Site, config: BOFTConfig) -> None:
        require_turnable(site, "BOFT")
        count, size = _blocks(site, config)
        together = 2 ** (config.boft_n_butterfly_factor - 1)
        if not count or count * size != columns(site) or count % together or (together > 1 and size % 2):
            raise ConfigError(
                f"{site.name} has {columns(site)} inputs, which are no whole number of blocks, or of even ones in "
                f"groups of {together}: choose another `boft_block_size`, `boft_block_num` or `boft_n_butterfly_factor`"
            )


def _blocks(site: Site, config: BOFTConfig) -> tuple[int, int]:
    """How many blocks there are at a site, and their size."""
    if config.boft_block_num:
        return config.boft_block_num, columns(site) // config.boft_block_num
    return columns(site) // config.boft_block_size, config.boft_block_size


def _turns(at: Operands) -> Any:
    """R - I of all blocks: (m, blocks, size, size)."""
    skew = aten.mul.Tensor(aten.sub.Tensor(at.a, aten.transpose.int(at.a, -1, -2)), 0.5)
    return torch.ops.lorafx.cayley.default(skew, 0)


def _dropped(turns: Any, at: Operands) -> Any:
    """The same with a share of the blocks of one factor, whichever, left out."""
    factors, count = at.config.boft_n_butterfly_factor, _blocks(at.site, at.config)[0]
    shape, kind = [factors, count, 1, 1], {"dtype": torch.float32}
    scores = aten.rand_like.default(aten.new_empty.default(at.a, shape), **kind)
    places = aten.argsort.default(aten.argsort.default(scores, 1), 1)
    dropped = aten.lt.Scalar(places, int(at.config.boft_dropout * count))
    which = aten.rand_like.default(aten.new_empty.default(at.a, [factors, 1, 1, 1]), **kind)
    dropped = aten.logical_and.default(dropped, aten.eq.Tensor(which, aten.amax.default(which)))
    return aten.masked_fill.Scalar(turns, dropped, 0.0)


def _turned(x: Any, turn: Any, i: int, at: Operands) -> Any:
    """x + x P (R - I) Pᵀ, of the last dimension; `turn` is the i-th factor's R - I, (blocks, size, size)."""
    count, size = _blocks(at.site, at.config)
    groups, half = count // 2**i, size // 2
    blocks = aten.unflatten.int(_exchanged(x, [groups, 2, 2**i, half]) if i else x, -1, [count, size])
    change = aten.einsum.default("...rk,rkc->...rc", [blocks, aten.type_as.default(turn, x)])
    change = aten.flatten.using_ints(change, -2)
    return aten.add.Tensor(x, _exchanged(change, [groups, 2**i, 2, half]) if i else change)


def _exchanged(x: Any, sizes: list[int]) -> Any:
    """The last dimension taken as these four, with the two in the middle exchanged."""
    return aten.flatten.using_ints(aten.transpose.int(aten.unflatten.int(x, -1, sizes), -3, -2), -4)
