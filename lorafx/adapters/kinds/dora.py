"""DoRA (Liu et al., 2024, arXiv 2402.09353, section 4): LoRA for the direction of each row, and a magnitude beside it.

    y = x W'ᵀ + b        W' = diag(g) (W + s · B A)        g = m / ‖W + s · B A‖, of each row; m (out,)
      = (y - b) g + b + g ∘ s · (x Aᵀ) Bᵀ

A, B and s are LoRA's. m starts as the norms are, so that g = 1. The norms are a constant to autograd (section 4.3). In
training with dropout, y in (g - 1) (y - b) is that of what dropout left of x, as in PEFT. Where a row and its update
are zero, it has no direction: g is 1 there, and the row trains as LoRA's.

What reads the weight transposed, because it is tied, gets the same W': x' = x ∘ g before a linear layer, and g[x] ∘ y
after a lookup. A convolution in groups has no ΔW of its weight's shape; its norms are those of the tensor that PEFT
takes for one (`ops/row_norms.py`), so that files mean the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...ops import row_norms as _operator  # noqa: F401, defines it
from ..low_rank import LowRank
from ..site import Site
from .kind import Kind, Operands, Spec
from .lora import Lora
from .lora_config import LoraConfig

aten = torch.ops.aten


class Dora(Lora):
    """What `use_dora=True` makes of LoRA; see the module's docstring for its equation."""

    variant = "use_dora"
    additive = False
    reads_weight = True
    derives = False  # the norms of W + s B A are constants for backward
    # What LoRA can do because its change of the weight does not depend on the weight:
    fused = Kind.fused
    approach = Kind.approach
    since = Kind.since
    unmerged = Kind.unmerged

    def before(self, x: Any, at: Operands) -> Any:
        if not at.is_turned or at.operator.lookup:  # type: ignore[union-attr]
            return x
        return aten.type_as.default(aten.mul.Tensor(x, _gain(at, at.weight)), x)

    def after(self, y: Any, x: Any, at: Operands) -> Any:
        if at.is_turned:
            updated = super().after(y, self.before(x, at), at)
            return aten.mul.Tensor(updated, _of_rows(_gain(at, at.weight), x)) if at.operator.lookup else updated  # type: ignore[union-attr]
        gain = at.outputs(_gain(at, at.weight))
        dropped = at.dropout(x, at.config.lora_dropout) if at.config.lora_dropout and at.training else x
        hidden = at.narrow(dropped, at.lora_A)
        update = aten.mul.Tensor(at.wide(hidden, at.lora_B), at.scaling)
        base, bias = y if dropped is x else at.operate(dropped), at.own_bias()
        if bias is not None:
            base = aten.sub.Tensor(base, bias)
        change = aten.add.Tensor(aten.mul.Tensor(base, aten.sub.Tensor(gain, 1)), aten.mul.Tensor(update, gain))
        return aten.add.Tensor(y, change)

    def transposed(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """The norms are those of W's rows all the same."""
        return super().transposed(tensors) | {"magnitude": tensors["magnitude"]}

    def merged(self, name: str, base: Tensor, at: Operands) -> Tensor:
        delta = self.delta(name, at)
        matrix = at.matrix(base + (delta.dense() if isinstance(delta, LowRank) else delta).to(base.dtype))
        return at.like_weight(matrix * _gain(at, base)[:, None])

    def tensors(self, site: Site, config: LoraConfig) -> dict[str, Spec]:
        spatial = len(site.weight_shape) - 2
        shape = (1, site.out_features, *[1] * spatial) if spatial else (site.out_features,)
        return super().tensors(site, config) | {"magnitude": Spec("lora_magnitude_vector", shape, as_kept=True)}

    def init(
        self,
        site: Site,
        config: LoraConfig,
        tensors: Mapping[str, Tensor],
        rng: torch.Generator | None,
        weight: Tensor | None,
    ) -> Tensor | None:
        rest = super().init(site, config, tensors, rng, weight)
        base = weight if rest is None else rest
        assert base is not None, "what reads the weight is given it"
        at = Operands(site, config, tensors, self.numbers(site, config))
        tensors["magnitude"].copy_(_norms(at, base).view(tensors["magnitude"].shape))
        return rest

    def check(self, site: Site, config: LoraConfig) -> None:
        super().check(site, config)
        if config.lora_bias:
            raise ConfigError("`use_dora` has no `lora_bias`, as in PEFT; leave one of them False")
        if config.ties and site.tied:
            raise ConfigError(
                f"{site.name} is tied to {site.tied[0]}, and `use_dora` with `ensure_weight_tying` would have a "
                "magnitude for each of them, which no tied weight has; leave one of both out"
            )


def _of_rows(gain: Any, x: Any) -> Any:
    """g of the rows that are looked up, (…, 1)."""
    return aten.unsqueeze.default(aten.index.Tensor(gain, [x]), -1)


def _gain(at: Operands, weight: Any) -> Any:
    """g (out,), in the dtype of m: half precision could not tell it from 1 before it has moved by 1/256."""
    norms = _norms(at, weight)
    known = aten.gt.Scalar(norms, 0)
    gain = aten.div.Tensor(aten.view.default(at.magnitude, [-1]), aten.where.ScalarOther(known, norms, 1.0))
    return aten.where.ScalarOther(known, gain, 1.0)


def _norms(at: Operands, weight: Any) -> Any:
    """‖W + s · B A‖ of each row, (out,)."""
    a, b = (aten.t.default(at.lora_B), aten.t.default(at.lora_A)) if at.is_turned else (at.lora_A, at.lora_B)
    a, b = aten.flatten.using_ints(a, 1), aten.flatten.using_ints(b, 1)
    return torch.ops.lorafx.row_norms.default(at.matrix(weight), a, aten.mul.Tensor(b, at.scaling))
