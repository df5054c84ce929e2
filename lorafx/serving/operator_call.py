"""An operator call: a torch function that reads an adapted tensor, and that no reading knows, to be a graph of its own.

It is captured, rewritten by the same pipeline and kept (`site_graphs`), like a call of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from ..capture.export import trace_operator
from ..graph.description import argument_key, parameter_key
from ..ops.modes import modes
from ..pipeline import Context
from .adapted_tensors import AdaptedTensors
from .call_key import OperatorKey
from .concerned import Concerned
from .tree_state import TreeState


class OperatorCall(NamedTuple):
    """A function with what the module at `part` gives it: `leaves`, in their structure, and their `paths` in the tree.

    `concerned` are the adapters of `context` that act on some of these.
    """

    tensors: AdaptedTensors
    context: Context
    part: str
    func: Callable[..., Any]
    leaves: list[Any]
    structure: pytree.TreeSpec
    paths: list[str | None]
    concerned: Concerned

    @classmethod
    def of(
        cls,
        tensors: AdaptedTensors,
        context: Context,
        part: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> OperatorCall:
        """The call, taken apart. Raises `AdapterError` if a module of the base reads a weight, in another mode."""
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors.require_one_mode(leaves, part)
        concerned = Concerned.by(leaves, tensors.tree, context, part)
        return cls(tensors, context, part, func, leaves, structure, tensors.paths(leaves, part), concerned)

    @property
    def inputs(self) -> list[Tensor]:
        """What its graph is given: the tensors that are not the tree's."""
        pairs = zip(self.leaves, self.paths)
        return [leaf for leaf, path in pairs if path is None and isinstance(leaf, Tensor)]

    def key(self, state: TreeState, hooked: tuple[str, ...]) -> OperatorKey:
        """What its graph is kept by in a tree of this state, where it calls `hooked` modules of adapters' tensors."""
        # A hook may have cast a weight since the layout was looked at.
        keys = tuple((p, *parameter_key(x)) if p else argument_key(x) for p, x in zip(self.paths, self.leaves))
        acting = tuple(adapter.call_key for adapter in self.context.adapters)
        how = self.func, self.structure, keys, modes()
        return OperatorKey(self.part, how, state.layout, acting, self.context.merged, hooked)

    def captured(self) -> tuple[GraphModule, Context]:
        """Its graph, to be rewritten, and the adapters that concern it. Raises `CaptureError` if there is none."""
        context, weights = self.concerned.restricted(), self.tensors.weights
        read = (weights[id(leaf)] for leaf in self.leaves if id(leaf) in weights)
        owners = {path.rpartition(".")[0] for path in (*filter(None, self.paths), *read)}
        owners.update(*(adapter.owners for adapter in context.adapters))
        tree, call = self.tensors.tree, (self.part, self.func, self.leaves, self.structure, self.paths, owners)
        return trace_operator(tree, *call), context
