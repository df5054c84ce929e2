"""fuse_lora: a linear operator and its update become one operator with a backward of its own.

x Wᵀ + b + s · (z Aᵀ) Bᵀ  ->  lora_linear(x, W, b, z, A, B, s)       z is x, or what dropout made of it

A scaling that is a tensor, which can change, multiplies B first: B is small beside what it gives. What the operator
saves is in `lorafx/ops/lora_linear.py`. Where dtypes differ, or the caller's autocast would change them, the update
stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from lorafx import ops  # noqa: F401, defines torch.ops.lorafx
from lorafx.graph import Match, Rule, made_by, rewrite_updates
from lorafx.ops.modes import autocast_dtype
from lorafx.pipeline import Context, Pass

aten = torch.ops.aten


def adapted(x, weight, bias, lora_A, lora_B, scaling):
    update = aten.linear.default(aten.linear.default(x, lora_A), lora_B)
    return aten.add.Tensor(aten.linear.default(x, weight, bias), aten.mul.Tensor(update, scaling))


def fused(x, weight, bias, lora_A, lora_B, scaling):
    return torch.ops.lorafx.lora_linear.default(x, weight, bias, None, lora_A, lora_B, scaling)


def adapted_apart(x, weight, bias, z, lora_A, lora_B, scaling):
    update = aten.linear.default(aten.linear.default(z, lora_A), lora_B)
    return aten.add.Tensor(aten.linear.default(x, weight, bias), aten.mul.Tensor(update, scaling))


def fused_apart(x, weight, bias, z, lora_A, lora_B, scaling):
    return torch.ops.lorafx.lora_linear.default(x, weight, bias, z, lora_A, lora_B, scaling)


def fused_scaled(x, weight, bias, lora_A, lora_B, scaling):
    return torch.ops.lorafx.lora_linear.default(x, weight, bias, None, lora_A, aten.mul.Tensor(lora_B, scaling), 1.0)


def fused_apart_scaled(x, weight, bias, z, lora_A, lora_B, scaling):
    return torch.ops.lorafx.lora_linear.default(x, weight, bias, z, lora_A, aten.mul.Tensor(lora_B, scaling), 1.0)


def _one_dtype(found: Match) -> str | None:
    values = [found.bindings[name].meta["val"] for name in ("x", "weight", "lora_A", "lora_B")]
    dtypes = {value.dtype for value in values} | {found.anchor.meta["val"].dtype}
    product = autocast_dtype(values[0].device.type)
    if len(dtypes) == 1 and product in (None, *dtypes):
        return None
    return f"one operator needs one dtype, not {', '.join(sorted(map(str, dtypes)))}" + (
        f" under autocast to {product}" if product else ""
    )


def _one_dtype_and_a_number(found: Match) -> str | None:
    return "the scaling is a tensor" if isinstance(found.bindings["scaling"], Node) else _one_dtype(found)


def _one_dtype_and_a_tensor(found: Match) -> str | None:
    scaling, maker = found.bindings["scaling"], made_by(found.anchor)
    if maker is None or not maker.adapter:
        return "a tensor scales the model's own update"
    if not isinstance(scaling, Node) or scaling.meta["val"].ndim:
        return "the scaling is no tensor of one number"
    return _one_dtype(found)


RULES = (
    Rule(adapted, fused, _one_dtype_and_a_number),
    Rule(adapted_apart, fused_apart, _one_dtype_and_a_number),
    Rule(adapted, fused_scaled, _one_dtype_and_a_tensor),
    Rule(adapted_apart, fused_apart_scaled, _one_dtype_and_a_tensor),
)


@dataclass(frozen=True)
class FuseLora(Pass):
    """Afterwards each adapted linear of one dtype is one node; `fold_scaling` is for the others."""

    exact = True
    requires = frozenset({"adapters"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        return rewrite_updates(RULES, gm, self.name)
