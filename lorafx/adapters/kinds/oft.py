"""OFT: features turned by orthogonal blocks (Qiu et al., 2023, arXiv 2306.07280; the form of 2506.19847, section 3).

    y = (x R) Wᵀ + b         W' = W Rᵀ            R = diag(R₁, …, R_r), each Rᵢ (size, size)
    Rᵢ = (I - Qᵢ) (I + Qᵢ)⁻¹                      Qᵢ skew-symmetric; or Neumann's series of it (`use_cayley_neumann`)

Of an embedding, what is looked up is turned: y = W[x] R. Q starts as zeros, so that R = I; files have the numbers above
its diagonals, (r, size · (size - 1) / 2), or one row for all blocks with `block_share`. x R is x + x (R - I) here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...ops import orthogonal as _operators  # noqa: F401, defines them
from ..config import (
    AdapterConfig,
    is_number,
    require,
    require_bias,
    require_counts,
    require_dropouts,
    require_flags,
    require_naturals,
)
from ..site import Selection, Site
from .kind import Operands, Spec
from .turning import Turning, columns, require_turnable

aten = torch.ops.aten


def _check(config: OFTConfig) -> None:
    require_naturals(config, "r", "oft_block_size")
    if (config.r == 0) == (config.oft_block_size == 0):
        raise ConfigError(
            "one of `r` and `oft_block_size` must be 0: the other, the number or size of blocks, says both"
        )
    require_flags(config, "fan_in_fan_out", "init_weights", "coft", "block_share", "use_cayley_neumann")
    require_dropouts(config, "module_dropout")
    require(is_number(config.eps) and config.eps > 0, "eps", config.eps, "a number above 0")
    require_counts(config, "num_cayley_neumann_terms")
    require_bias(config, "oft_only")


@dataclass(frozen=True, kw_only=True)
class OFTConfig(AdapterConfig):
    """What to adapt and how: the fields of `peft.OFTConfig`, with its names and defaults.

    With `coft` no block of Q is longer than `eps` / √blocks: before each call, parameters are brought back to that.
    """

    peft_type: str = "OFT"
    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    checks = (_check,)


class Oft(Turning):
    """The OFT kind; see the module's docstring for its equation."""

    config = OFTConfig

    def turned(self, x: Any, at: Operands, transposed: bool = False) -> Any:
        turn = _turn(at)
        return _turned(x, aten.transpose.int(turn, -1, -2) if transposed else turn, at)

    def before(self, x: Any, at: Operands) -> Any:
        return x if at.site.reading.lookup else super().before(x, at)

    def after(self, y: Any, x: Any, at: Operands) -> Any:
        return self.turned(y, at) if at.site.reading.lookup else super().after(y, x, at)

    def merged(self, name: str, base: Tensor, at: Operands) -> Tensor:
        return _on_weight(base, at, _turn(at))

    def unmerged(self, name: str, merged: Tensor, at: Operands) -> Tensor:
        turn = _turn(at)
        identity = torch.eye(turn.shape[-1], dtype=turn.dtype, device=turn.device)
        return _on_weight(merged, at, torch.linalg.inv(identity + turn) - identity)

    def bounded(self, config: OFTConfig, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Section 4.2 of the paper: R stays near the identity."""
        q, limit = tensors["q"], config.eps / math.sqrt(len(tensors["q"]))
        if not config.coft:
            return {}
        lengths = math.sqrt(2) * torch.linalg.vector_norm(q, dim=1, keepdim=True)  # each number is in Q twice
        beyond = lengths > limit * (1 + 8 * torch.finfo(q.dtype).eps)  # what was brought back stays as it is
        return {"q": torch.where(beyond, q * (limit / lengths), q)} if beyond.any() else {}

    def tensors(self, site: Site, config: OFTConfig) -> dict[str, Spec]:
        count, size = _blocks(site, config)
        suffix = "oft_embedding_R.weight" if site.reading.lookup else "oft_R.weight"
        return {"q": Spec(suffix, (1 if config.block_share else count, size * (size - 1) // 2), as_kept=True)}

    def init(
        self,
        site: Site,
        config: OFTConfig,
        tensors: Mapping[str, Tensor],
        rng: torch.Generator | None,
        weight: Tensor | None,
    ) -> None:
        if config.init_weights:
            tensors["q"].zero_()
        else:
            tensors["q"].normal_(std=0.1, generator=rng)

    def check(self, site: Site, config: OFTConfig) -> None:
        require_turnable(site, "OFT", lookups=True)

    def remarks(self, selection: Selection, config: OFTConfig) -> Iterator[str]:
        field, wanted = ("r", config.r) if config.r else ("oft_block_size", config.oft_block_size)
        found = {site.name: _blocks(site, config)[0 if config.r else 1] for site in selection}
        if other := [name for name, number in found.items() if number != wanted]:
            yield f"`{field}` {wanted} does not divide all sizes: it is {found[other[0]]} at {other[0]}, as in PEFT"
        if config.module_dropout:
            yield "`module_dropout` of OFT has no effect, as in PEFT 0.21"


def _blocks(site: Site, config: OFTConfig) -> tuple[int, int]:
    """How many blocks there are at a site, and their size: the nearest to what the config says that divides."""
    features = site.out_features if site.reading.lookup else columns(site)
    if config.r:
        count = _nearest_divisor(features, config.r)
        return count, features // count
    size = _nearest_divisor(features, config.oft_block_size)
    return features // size, size


def _nearest_divisor(features: int, wanted: int) -> int:
    divisors = [number for number in range(1, features + 1) if features % number == 0]
    return min(divisors, key=lambda number: (abs(number - wanted), number))


def _turn(at: Operands) -> Any:
    """R - I: (blocks, size, size), or (1, size, size)."""
    terms = at.config.num_cayley_neumann_terms if at.config.use_cayley_neumann else 0
    skew = torch.ops.lorafx.skew_symmetric.default(at.q, _blocks(at.site, at.config)[1])
    return torch.ops.lorafx.cayley.default(skew, terms)


def _turned(x: Any, turn: Any, at: Operands) -> Any:
    """x + x (R - I), of the last dimension."""
    blocks = aten.unflatten.int(x, -1, list(_blocks(at.site, at.config)))
    shares = "...rk,kc->...rc" if at.config.block_share else "...rk,rkc->...rc"
    turn = aten.squeeze.dim(turn, 0) if at.config.block_share else turn
    change = aten.einsum.default(shares, [blocks, aten.type_as.default(turn, x)])
    return aten.add.Tensor(x, aten.flatten.using_ints(change, -2))


def _on_weight(weight: Tensor, at: Operands, turn: Tensor) -> Tensor:
    """W Rᵀ of the dense weight, or W R of an embedding's."""
    if at.site.reading.lookup:
        return _turned(weight, turn, at)
    return at.like_weight(_turned(at.matrix(weight), turn.mT, at))
