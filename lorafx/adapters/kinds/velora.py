"""VeLoRA (Miles et al., 2024, arXiv 2405.17991): LoRA that trains A by a compressed x, which is all that is kept of it.

    y as in LoRA;  ∂A = ∂hᵀ x̂        h = x Aᵀ;  x̂ = τ · (x_g · e) e  of each of G groups of x's features, τ = `scale`

So a token has G numbers for backward, and not as many as it has features. e (features / G,) has norm 1: the average of
all groups of all tokens of a call ("batch_average"), that of the first call in training ("batch_average_once"), or
random ("random"). The last two are kept; zeros say that there was no such call yet. Features that fill no group are
followed by zeros.

Autograd is told of this by a sum that is zero: h = x A'ᵀ + (t - t'), where t = τ · c (A e)ᵀ, c (tokens, G) are the
products x_g · e, and what has a dash is a constant. Of these c is kept, and A.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ..readings import CONV1D, LINEAR
from ..site import Site
from .kind import Kind, Operands, Spec
from .lora import Lora
from .lora_config import LoraConfig

aten = torch.ops.aten


class Velora(Lora):
    """What `velora_config` makes of LoRA; see the module's docstring for its equation."""

    variant = "velora_config"
    derives = False  # A's gradient is that of what is kept of x
    transposed = Kind.transposed  # where A has the features of y, nothing is said of what to compress

    def hidden(self, x: Any, at: Operands) -> Any:
        if not at.training:
            return super().hidden(x, at)
        x = at.dropout(x, at.config.lora_dropout)
        groups = _in_groups(aten.detach.default(x), at)
        direction = _direction(groups, at)
        kept = aten.matmul.default(groups, direction)
        of_groups = aten.matmul.default(_in_groups(at.lora_A, at), direction)
        through = aten.linear.default(kept, aten.mul.Tensor(of_groups, at.config.subconfig(self.variant)["scale"]))
        zero = aten.sub.Tensor(through, aten.detach.default(through))
        return aten.add.Tensor(at.narrow(x, aten.detach.default(at.lora_A)), zero)

    def fused(self, x: Any, at: Operands) -> Any | None:
        return None if at.training else super().fused(x, at)

    def by_row(self, y: Any, x: Any, rows: Any, numbers: tuple[int, ...], ats: tuple[Operands, ...]) -> Any | None:
        return None if any(at.training for at in ats) else super().by_row(y, x, rows, numbers, ats)

    def tensors(self, site: Site, config: LoraConfig) -> dict[str, Spec]:
        embed = Spec("lora_velora_embed", (_features(site, config),), as_kept=True, fixed=True)
        return super().tensors(site, config) | {"embed": embed}

    def sized(self, config: LoraConfig) -> tuple[str, ...]:
        return ()

    def check(self, site: Site, config: LoraConfig) -> None:
        super().check(site, config)
        if site.reading not in (LINEAR, CONV1D):
            raise ConfigError(f"{site.name} is read by {site.reading}, and `velora_config` is for linear layers")

    def init(
        self,
        site: Site,
        config: LoraConfig,
        tensors: Mapping[str, Tensor],
        rng: torch.Generator | None,
        weight: Tensor | None,
    ) -> Tensor | None:
        rest = super().init(site, config, tensors, rng, weight)
        tensors["embed"].zero_()
        if config.subconfig(self.variant)["init_type"] == "random":
            nn.init.normal_(tensors["embed"], generator=rng)
            tensors["embed"].div_(torch.linalg.vector_norm(tensors["embed"]))
        return rest


def _features(site: Site, config: LoraConfig) -> int:
    """How many features a group has."""
    return -(-site.in_features // config.subconfig(Velora.variant)["num_groups"])


def _in_groups(matrix: Any, at: Operands) -> Any:
    """(…, in) -> (…, G, features of a group)"""
    groups, features = at.config.subconfig(Velora.variant)["num_groups"], _features(at.site, at.config)
    if lacking := groups * features - at.site.in_features:
        matrix = aten.constant_pad_nd.default(matrix, [0, lacking])
    return aten.unflatten.int(matrix, -1, [groups, features])


def _direction(groups: Any, at: Operands) -> Any:
    """e (features of a group,), of the dtype of x; where the average is zero, as without tokens, its numbers are equal.

    That of the first call that has one is written where it is kept, and read from a tensor of the call's own, for
    another call may come before backward.
    """
    kind = at.config.subconfig(Velora.variant)["init_type"]
    if kind == "random":
        return aten.type_as.default(at.embed, groups)
    by_group = aten.reshape.default(groups, [-1, _features(at.site, at.config)])
    total = aten.sum.dim_IntList(by_group, [0], dtype=torch.float32)  # of the average's direction
    is_zero = aten.eq.Scalar(aten.linalg_vector_norm.default(total), 0)
    total = aten.add.Tensor(total, is_zero)
    found = aten.div.Tensor(total, aten.linalg_vector_norm.default(total))
    if kind == "batch_average_once":
        is_known = aten.gt.Scalar(aten.linalg_vector_norm.default(at.embed), 0)
        found = aten.where.self(is_known, at.embed, aten.type_as.default(found, at.embed))
        aten.copy_.default(at.embed, aten.where.self(is_zero, at.embed, found))
    return aten.type_as.default(found, groups)
