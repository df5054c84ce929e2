"""Rebinding: a graph that was rewritten for some adapters becomes that of others of the same form.

    layers.0.q_proj.lora_A.a.weight   ->   layers.0.q_proj.lora_A.b.weight

They differ in names and values alone, so nothing is captured, rewritten or compiled: the graph is copied, and reads the
other tensors.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import replace
from typing import NamedTuple

from torch import nn
from torch.fx import GraphModule, Node

from ..graph import ADAPTED_BY, MADE_BY, made_by
from ..graph.blocks import LAYERS, blocks_of
from ..graph.modules import copied
from ..pipeline import Context, Step


class Rewritten(NamedTuple):
    """A graph after all passes, with the adapters that it was rewritten for, their forms, what the passes did, and what
    it was before them.
    """

    gm: GraphModule
    context: Context
    forms: tuple[Hashable, ...]
    steps: tuple[Step, ...]
    captured: GraphModule

    def serves(self, context: Context, forms: tuple[Hashable, ...]) -> bool:
        """Whether it can be rebound to other adapters: of equal forms and options, trained along with the same."""
        options = [[adapter.config.options for adapter in each.adapters] for each in (self.context, context)]
        return self.forms == forms and options[0] == options[1] and self.context.trained == context.trained


def rebound(gm: GraphModule, tree: nn.Module, old: Context, new: Context) -> GraphModule:
    """A copy of a graph over `tree` in which each adapter of `new` is in the place of that of `old`."""
    paths = {a: b for one, other in zip(old.adapters, new.adapters) for a, b in zip(one.paths, other.paths)}
    names = {one.name: other.name for one, other in zip(old.adapters, new.adapters)}
    other = copied(gm, tree)
    for part, prefix in _parts(other):
        for node in part.graph.nodes:
            if node.op == "get_attr" and (path := paths.get(f"{prefix}{node.target}")):
                node.target = path.removeprefix(prefix)
            _rename(node, names)
        part.recompile()
    return other


def _parts(gm: GraphModule) -> Iterator[tuple[GraphModule, str]]:
    """A graph and its blocks, each with what the paths that it reads begin with."""
    yield gm, ""
    yield from ((block, f"{block.meta[LAYERS][0]}.") for block in blocks_of(gm))


def _rename(node: Node, names: dict[str, str]) -> None:
    """Have a node's record of who made it name the other adapter."""
    maker = made_by(node)
    if maker is not None and maker.adapter in names:
        node.meta[MADE_BY] = replace(maker, adapter=names[maker.adapter])
    if ADAPTED_BY in node.meta:
        node.meta[ADAPTED_BY] = tuple(names.get(name, name) for name in node.meta[ADAPTED_BY])
