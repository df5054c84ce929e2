"""freeze_base: the base does not train.

The flag lives on the parameters, so this pass writes no node: it clears `requires_grad` on every parameter of the base,
and from then on the verifier holds every graph to it. Which adapters train is decided where they are activated, and a
user who freezes some of their tensors by hand is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule

from lorafx.pipeline import Context, Pass
from lorafx.tree import own_modules


@dataclass(frozen=True)
class FreezeBase(Pass):
    """Afterwards no parameter of the base trains."""

    requires = frozenset({"adapters"})
    establishes = frozenset({"frozen"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        base = [p for module in own_modules(gm) for p in module._parameters.values() if p is not None]
        trained = [parameter for parameter in base if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        return len(trained)
