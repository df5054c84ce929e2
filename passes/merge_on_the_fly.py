"""merge_on_the_fly: adapted linears compute x (W + ΔW)ᵀ wherever that takes fewer multiplications.

lora_linear(x, W, b, None, A, B, s)     ->  lora_linear(x, W, b, None, A, B, s, merge=True)
lora_linears(x, [W, …], …, [s, …])      ->  lora_linears(x, [W, …], …, [s, …], merge=True)

The operator chooses in each call, by the number of rows of x: for k in and n out features it merges above n k / (n + k)
rows in inference, and above 2 n k / (n + k) in training. `lorafx/ops/merged_linears.py` counts.

It is not in the default pipeline because W + ΔW is rounded to the weight's dtype. In float32 that rounding is like any
other; in half precision ΔW, which is small beside W, loses what is below half a step of W: up to 2⁻⁸ of W in bfloat16,
2⁻¹¹ in float16. It goes after `fuse_lora`, `fuse_loss` and `share_input`, which look for operators without `merge`:

    lorafx.compile(model, config, pipeline=lorafx.passes.default + [lorafx.passes.MergeOnTheFly()])
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from lorafx import ops  # noqa: F401, defines torch.ops.lorafx
from lorafx.graph import MADE_BY, Provenance, arguments, made_by, resolve, within_vmap
from lorafx.ops.calls import is_plain
from lorafx.pipeline import Context, Pass
from lorafx.torch_private.tensors import is_traceable_wrapper_subclass

_one, _several = torch.ops.lorafx.lora_linear.default, torch.ops.lorafx.lora_linears.default


@dataclass(frozen=True)
class MergeOnTheFly(Pass):
    """Afterwards each adapted linear without dropout, on a plain weight, chooses the cheaper order when it runs.

    A weight that is computed (of a quantised one, say) is merged as that value. Weights of a tensor class of its own
    cannot be added to and are left, as are operators within a vmap, which run as the equation's own operators.
    """

    requires = frozenset({"adapters"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        count = 0
        for node in gm.graph.nodes:
            weights = _weights(node)
            if weights and not within_vmap(node) and all(_is_plain(weight, gm) for weight in weights):
                node.update_kwarg("merge", True)
                maker = made_by(node) or Provenance(self.name)
                node.meta[MADE_BY] = Provenance(self.name, maker.site, maker.adapter)
                count += 1
        return count


def _weights(node: Node) -> list[Node]:
    """The base weights of an adapted linear without dropout that is not marked yet."""
    if node.target not in (_one, _several) or (given := arguments(node))["merge"]:
        return []
    if node.target is _several:
        return list(given["weights"])
    return [given["weight"]] if given["z"] is None and not given["dropout"] else []


def _is_plain(weight: Node, gm: GraphModule) -> bool:
    """Whether a weight is an ordinary tensor, of no class with arithmetic of its own."""
    if weight.op == "get_attr":
        return is_plain(resolve(gm, str(weight.target)))
    return not is_traceable_wrapper_subclass(weight.meta["val"])
