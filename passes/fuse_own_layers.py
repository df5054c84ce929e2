"""fuse_own_layers: a layer that runs its own code and its update become one operator with a backward of its own.

layer(x) + s · (z Aᵀ) Bᵀ  ->  own_lora_linear(x, b, number, features, z, A, B, s)    z is x, or what dropout made of it

It is `fuse_lora` for layers whose weight only their own code reads, where the storage knows that their gradient is a
product with W, as it is of bitsandbytes' layers. What the operator saves is in `lorafx/ops/own_lora_linears.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from lorafx import ops  # noqa: F401, defines torch.ops.lorafx
from lorafx.graph import Match, Rule, rewrite_updates, within_vmap
from lorafx.ops.modes import autocast_dtype
from lorafx.pipeline import Context, Pass
from lorafx.tree.lookup import find_tensor
from lorafx.tree.own_layers import layer_of, own_forward_of

aten, own = torch.ops.aten, torch.ops.lorafx


def adapted(x, bias, number, features, lora_A, lora_B, scaling):
    update = aten.linear.default(aten.linear.default(x, lora_A), lora_B)
    layer = own.own_forward.default(x, None, bias, number, features, None)
    return aten.add.Tensor(layer, aten.mul.Tensor(update, scaling))


def fused(x, bias, number, features, lora_A, lora_B, scaling):
    return own.own_lora_linear.default(x, bias, number, features, None, lora_A, lora_B, scaling)


def adapted_apart(x, bias, number, features, z, lora_A, lora_B, scaling):
    update = aten.linear.default(aten.linear.default(z, lora_A), lora_B)
    layer = own.own_forward.default(x, None, bias, number, features, None)
    return aten.add.Tensor(layer, aten.mul.Tensor(update, scaling))


def fused_apart(x, bias, number, features, z, lora_A, lora_B, scaling):
    return own.own_lora_linear.default(x, bias, number, features, z, lora_A, lora_B, scaling)


def _check(found: Match) -> str | None:
    x, lora_A, lora_B = (found.bindings[name].meta["val"] for name in ("x", "lora_A", "lora_B"))
    dtypes = {value.dtype for value in (x, lora_A, lora_B)}
    if len(dtypes) > 1 or autocast_dtype(x.device.type) not in (None, x.dtype):
        return "one operator needs one dtype, also under autocast"
    if isinstance(found.bindings["scaling"], Node):
        return "the scaling is a tensor"
    if within_vmap(found.anchor):
        return "it is within a vmap"
    return None if _has_factor(found) else "its layer does not know the matrix that its gradient is multiplied by"


def _has_factor(found: Match) -> bool:
    gm, number = found.anchor.graph.owning_module, found.bindings["number"]
    assert gm is not None, "a graph that is rewritten belongs to a module"
    tensor = find_tensor(gm, str(number.target)) if number.op == "get_attr" else None
    forward = None if tensor is None else own_forward_of(layer_of(tensor))
    return forward is not None and forward.factor is not None


RULES = Rule(adapted, fused, _check), Rule(adapted_apart, fused_apart, _check)


@dataclass(frozen=True)
class FuseOwnLayers(Pass):
    """Afterwards each adapted layer of its own code, whose gradient is known and which is of one dtype, is one node."""

    exact = True
    requires = frozenset({"adapters"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        return rewrite_updates(RULES, gm, self.name)
