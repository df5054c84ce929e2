"""freeze_base: only the adapters train.

The flag lives on the parameters, so this pass writes no node: it sets `requires_grad` on everything below the graph's
root, and from then on the verifier holds every graph to it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule

from lorafx.adapter import trainable_paths
from lorafx.pipeline import Context, Pass
from lorafx.tree import set_trainable


@dataclass(frozen=True)
class FreezeBase(Pass):
    """Afterwards the trainable parameters are those of the active adapters that are not in inference mode."""

    requires = frozenset({"adapters"})
    establishes = frozenset({"frozen"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        before = {path for path, p in gm.named_parameters() if p.requires_grad}
        set_trainable(gm, trainable_paths(gm, context.adapters))
        return len(before ^ {path for path, p in gm.named_parameters() if p.requires_grad})
