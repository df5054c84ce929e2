"""Lower: a rewritten graph becomes what runs, the graph itself or a compiled form of it.

A graph with blocks is compiled in pieces: each block once for all its layers, and each run of operators between the
calls of blocks. A piece that is like an earlier one, as those of another adapter of the same shapes are, is that one.
What a graph defers (logits that nobody has asked for yet) stays between pieces too: compiled, it would be computed. So
do recurrent layers. A graph without any of these is compiled as a whole.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from ..graph.blocks import LAYERS, blocks_of, is_block_call, is_of_block
from ..graph.modules import CAPTURED, by_leaves
from ..graph.outline import call_module_instead, graph_of, with_reads_as_inputs
from ..graph.regions import Region, is_size, signature
from ..ops.deferral import heads, is_deferral
from ..torch_private.graphs import output_spec_of
from .backend import Backend
from .cuda_graphs import Cuda, Replayed, device_of
from .eager import direct, read_together
from .errors_in_graphs import naming_compiled, naming_lines
from .pieces import Compiled, CompiledBlock, Piece

_SMALL = 3  # so few operators between two blocks run as they are
# A compiler would have the operators of each step of a sequence, as often as there are steps.
_RECURRENT = {torch.ops.aten.lstm, torch.ops.aten.gru, torch.ops.aten.rnn_tanh, torch.ops.aten.rnn_relu}


class Lowered(NamedTuple):
    """What serves calls of a graph, from a call's leaves to its output's, and how these make the output."""

    graph: GraphModule  # over the same tree
    run: Callable[..., Any]  # the graph itself, or a compiled form of it
    output: pytree.TreeSpec
    launched: Any = ""  # printed: how often a CUDA graph was launched instead, or why none is, where anybody asked


class Lowering:
    """What compiles graphs for one adapted model, and the pieces it has compiled. Sizes stay dynamic."""

    def __init__(self, backend: Backend):
        self.backend = backend
        self.pieces: dict[Hashable, Piece] = {}
        self._devices: dict[torch.device, Cuda] = {}

    def lower(self, gm: GraphModule) -> Lowered:
        """What serves calls of `gm`."""
        lowered = self._lower(gm)
        if not self.backend.records:
            return lowered
        device = device_of(gm)
        if device is None:
            return lowered._replace(launched="not recorded: the parameters are not all on one CUDA device")
        replayed = Replayed(lowered.run, gm, self._devices.setdefault(device, Cuda(device)))
        return lowered._replace(run=replayed, launched=replayed)

    def _lower(self, gm: GraphModule) -> Lowered:
        compiler, output = self.backend.on(gm), output_spec_of(gm)
        if compiler == "eager":
            graph = direct(gm)
        elif blocks_of(gm) or heads(gm) or any(map(_is_recurrent, gm.graph.nodes)):
            graph = self._in_pieces(gm, compiler)
        else:
            graph = by_leaves(gm)
            whole = self.pieces[id(graph)] = Piece("whole graph", graph.forward, compiler, self.backend)
            return Lowered(graph, naming_compiled(whole), output)
        return Lowered(graph, naming_lines(graph), output)

    def _in_pieces(self, gm: GraphModule, compiler: str) -> GraphModule:
        """The outer graph with compiled pieces in it; it reads parameters from the same tree."""
        outer = by_leaves(gm)
        graph, pieces = outer.graph, outer.get_submodule(CAPTURED)
        for block in blocks_of(gm):
            title = f"{len(block.meta[LAYERS])} layers, {block.meta[LAYERS][0]} first"
            lifted, paths = with_reads_as_inputs(block.graph)
            pieces._modules[block.meta["name"]] = CompiledBlock(self._piece(title, lifted, compiler), paths)
        for number, nodes in enumerate(_between_blocks(graph)):
            region, name = Region("", tuple(nodes)), f"between_{number}"
            title = f"{len(nodes)} operators outside layers"
            pieces.add_module(name, Compiled(self._piece(title, graph_of(region), compiler)))
            call_module_instead(graph, region, f"{CAPTURED}.{name}")
        read_together(outer)
        outer.recompile()
        return outer

    def _piece(self, title: str, graph: Graph, compiler: str) -> Piece:
        key = compiler, signature(graph.find_nodes(op="placeholder"), graph.nodes)
        if key not in self.pieces:
            self.pieces[key] = Piece(title, GraphModule(nn.Module(), graph).forward, compiler, self.backend)
        return self.pieces[key]


def _between_blocks(graph: Graph) -> list[list[Node]]:
    """Runs of operators that nothing interrupts: no block, no deferral, no region of other modes, no guard."""
    runs: list[list[Node]] = [[]]
    for node in graph.nodes:
        if _runs_as_it_is(node):
            runs.append([])
        elif is_size(node):
            if not set(node.all_input_nodes).isdisjoint(runs[-1]):  # it is computed from values
                runs.append([])
        elif node.op == "call_function" and not _is_part(node):
            runs[-1].append(node)
    return [run for run in runs if len(run) > _SMALL]


def _runs_as_it_is(node: Node) -> bool:
    return _is_region(node) or node.op == "call_module" or is_block_call(node) or is_deferral(node)


def _is_region(node: Node) -> bool:
    """Whether a node stands for a region of other modes, or for a layer that computes step by step."""
    return isinstance(node.target, torch._ops.HigherOrderOperator) or _is_recurrent(node)


def _is_recurrent(node: Node) -> bool:
    return getattr(node.target, "overloadpacket", None) in _RECURRENT


def _is_part(node: Node) -> bool:
    """Whether a node takes one of several results of something that runs as it is."""
    source = node.args[0] if node.target is operator.getitem else None
    return is_of_block(node) or (isinstance(source, Node) and _is_region(source))
