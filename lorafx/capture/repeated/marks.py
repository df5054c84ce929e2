"""Marks: nodes that stand for layers in a graph while it is captured; `folding` turns them into blocks and calls."""

from __future__ import annotations

from typing import Any

from torch._ops import HigherOrderOperator
from torch.fx import Node
from torch.fx.node import has_side_effect


class _Layer(HigherOrderOperator):
    """The operator that marks call, in one of two ways.

    After a layer that was traced, the first of its kind, with the nodes of all that it made and of all that it did:
        layer(path, kind, inputs, made, nodes)
    In the place of a layer that is like it, giving those of the tensors made that have these numbers:
        layer(path, kind, inputs, numbers)
    """

    def __init__(self) -> None:
        super().__init__("lorafx_layer")

    def __call__(self, *args: Any) -> Any:
        raise NotImplementedError("stands for a layer while a graph is made")


layer_like = has_side_effect(_Layer())  # or torch would drop marks that nobody uses


class Mark:
    """A node that marks a layer, by the names of its arguments."""

    def __init__(self, node: Node):
        self.node = node

    path = property(lambda self: self.node.args[0])
    kind = property(lambda self: self.node.args[1])
    inputs = property(lambda self: self.node.args[2])
    results = property(lambda self: self.node.args[3])  # nodes, or numbers of those that the first of the kind has
    nodes = property(lambda self: self.node.args[4] if len(self.node.args) > 4 else ())

    def used(self) -> dict[Node, int]:
        """The nodes that take one of the layer's results, by the result's number, if somebody uses them."""
        return {part: self.results[part.args[1]] for part in self.node.users if part.users}
