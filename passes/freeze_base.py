"""freeze_base: the base does not train.

The flag lives on the parameters, so this pass writes no node: it clears `requires_grad` on every parameter of the base,
except those that the context lists as trained by the user, and from then on the verifier checks it. Which adapters
train is decided where they are activated.

In an adapted model's own calls it has nothing to clear: there the context lists whatever trains at that moment, and a
pass that makes a base parameter trainable is found by the check. It acts on a graph that is rewritten by hand, with a
context that lists less.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule

from lorafx.graph.modules import CAPTURED
from lorafx.pipeline import Context, Pass
from lorafx.tree.attached import trained_paths


@dataclass(frozen=True)
class FreezeBase(Pass):
    """Afterwards no parameter of the base trains that the context does not list as trained."""

    exact = True
    requires = frozenset({"adapters"})
    establishes = frozenset({"frozen"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        trained = {p for p in trained_paths(gm) - context.trained if not p.startswith(f"{CAPTURED}.")}
        for path in trained:
            gm.get_parameter(path).requires_grad_(False)
        return len(trained)
