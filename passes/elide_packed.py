"""elide_packed: layers that run their own forward are found by their number alone.

own_forward(x, W, b, number)  ->  own_forward(x, None, b, number)

Sites are known by the weight, which is read for nothing once they are found. Packed weights are tensors of libraries'
own classes, and no compiler has to be shown one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from lorafx.pipeline import Context, Pass

_own_forward = torch.ops.lorafx.own_forward.default


@dataclass(frozen=True)
class ElidePacked(Pass):
    """Afterwards no packed weight is read."""

    exact = True
    requires = frozenset({"adapters"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        count = 0
        for node in gm.graph.find_nodes(op="call_function", target=_own_forward):
            weight = node.args[1]
            if weight is not None:
                node.update_arg(1, None)
                count += 1
                if not weight.users:
                    gm.graph.erase_node(weight)
        return count
