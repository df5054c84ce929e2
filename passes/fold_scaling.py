"""fold_scaling: the adapter's scaling becomes the `alpha` of the operator that adds its update.

base + s · (h Bᵀ)  ->  addmm(base, h, Bᵀ, alpha=s)      on matrices: one GEMM that accumulates
base + s · update  ->  add(base, update, alpha=s)       for what is no matrix product, or mixes dtypes
s · (h Bᵀ)         ->  h (s B)ᵀ                         where s is a tensor, which can change: B is small
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from lorafx.graph import Match, Provenance, Rule, fake_mode_of, first_match, made_by
from lorafx.ops.modes import autocast_dtype
from lorafx.pipeline import Context, Pass
from lorafx.torch_private.graphs import is_erased

aten = torch.ops.aten


def product(base, hidden, lora_B, scaling):
    return aten.add.Tensor(base, aten.mul.Tensor(aten.linear.default(hidden, lora_B), scaling))


def folded_matrix(base, hidden, lora_B, scaling):
    return aten.addmm.default(base, hidden, aten.t.default(lora_B), alpha=scaling)


def folded_product(base, hidden, lora_B, scaling, outputs, rank):
    rows = aten.reshape.default(base, [-1, outputs])
    hidden_rows = aten.reshape.default(hidden, [-1, rank])
    total = aten.addmm.default(rows, hidden_rows, aten.t.default(lora_B), alpha=scaling)
    return aten.view_as.default(total, base)


def scaled(base, update, scaling):
    return aten.add.Tensor(base, aten.mul.Tensor(update, scaling))


def folded_sum(base, update, scaling):
    return aten.add.Tensor(base, update, alpha=scaling)


def scaled_product(hidden, lora_B, scaling):
    return aten.mul.Tensor(aten.linear.default(hidden, lora_B), scaling)


def product_of_scaled(hidden, lora_B, scaling):
    return aten.linear.default(hidden, aten.mul.Tensor(lora_B, scaling))


def _is_matrix(found: Match) -> str | None:
    return _one_dtype(found) or (None if found.bindings["base"].meta["val"].ndim == 2 else "base is no matrix")


def _one_dtype(found: Match) -> str | None:
    if reason := _is_number(found):
        return reason
    base, hidden, weight = (found.bindings[name].meta["val"] for name in ("base", "hidden", "lora_B"))
    product_dtype = autocast_dtype(base.device.type) or weight.dtype
    if base.dtype == hidden.dtype == product_dtype:
        return None
    return f"addmm needs one dtype, not {base.dtype}, {hidden.dtype} and {weight.dtype}"


def _is_number(found: Match) -> str | None:
    return "the scaling is a tensor" if isinstance(found.bindings["scaling"], Node) else None


def _is_one_number(found: Match) -> str | None:
    """A tensor of one number, and not one of many that multiplies in a way of its own."""
    scaling = found.bindings["scaling"]
    one = isinstance(scaling, Node) and scaling.meta["val"].ndim == 0
    return None if one else "the scaling is no tensor of one number"


MATRIX = Rule(product, folded_matrix, _is_matrix)
PRODUCT = Rule(product, folded_product, _one_dtype)
SUM = Rule(scaled, folded_sum, _is_number)
FACTOR = Rule(scaled_product, product_of_scaled, _is_one_number)


@dataclass(frozen=True)
class FoldScaling(Pass):
    """Afterwards no node multiplies an adapter's update by a scaling that is a number, or a product by a tensor."""

    exact = True
    requires = frozenset({"adapters"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        mode, count = fake_mode_of(gm), 0
        for node in reversed(list(gm.graph.nodes)):
            maker = made_by(node)
            if maker is None or not maker.adapter or is_erased(node):
                continue
            if applies := first_match((MATRIX, PRODUCT, SUM, FACTOR), node):
                rule, found = applies
                rule.apply(gm, found, Provenance(self.name, maker.site, maker.adapter), mode, _sizes(found))
                count += 1
        return count


def _sizes(found: Match) -> dict[str, int]:
    if "lora_B" not in found.bindings or "base" not in found.bindings:
        return {}
    outputs, rank = found.bindings["lora_B"].meta["val"].shape
    return {"outputs": outputs, "rank": rank}
