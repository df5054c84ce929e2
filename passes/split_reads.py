"""split_reads: where a parameter is cut into parts, each part becomes a slice of the parameter.

chunk(W, 3)[1]  ->  slice(W, 0, n, 2n)        also for `split`; nn.MultiheadAttention reads its packed weight so

Then each operator that reads a part can be matched by itself.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from lorafx.graph import Provenance, describe, fake_mode_of
from lorafx.pipeline import Context, Pass
from lorafx.torch_private.tracing import FakeTensorMode

aten = torch.ops.aten
CUTS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)


@dataclass(frozen=True)
class SplitReads(Pass):
    """Afterwards no parameter is cut along its rows by `chunk` or `split`."""

    exact = True
    requires = frozenset({"canonical"})
    establishes = frozenset({"parts"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        mode, cuts = fake_mode_of(gm), [node for node in gm.graph.nodes if _cuts_a_parameter(node)]
        return sum(_slice(gm, cut, mode) for cut in cuts)


def _cuts_a_parameter(node: Node) -> bool:
    if node.target not in CUTS or any(user.target is not operator.getitem for user in node.users):
        return False
    along: object = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    whole = node.args[0]
    return bool(along == 0) and isinstance(whole, Node) and whole.op == "get_attr"


def _slice(gm: GraphModule, cut: Node, mode: FakeTensorMode) -> int:
    """Put a slice in the place of each part of a cut; returns how many."""
    bounds, start = [], 0
    for piece in cut.meta["val"]:
        bounds.append((start, start + piece.shape[0]))
        start += piece.shape[0]
    parts = list(cut.users)
    for part in parts:
        with gm.graph.inserting_before(part):
            piece = gm.graph.call_function(aten.slice.Tensor, (cut.args[0], 0, *bounds[part.args[1]]))  # type: ignore
        describe(piece, part, Provenance(SplitReads.name), gm, mode)
        part.replace_all_uses_with(piece)
        gm.graph.erase_node(part)
    gm.graph.erase_node(cut)
    return len(parts)
