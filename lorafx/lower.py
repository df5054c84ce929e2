"""Lower: a rewritten graph becomes what runs, the graph itself or a compiled form of it.

A graph with blocks is compiled in pieces: each block once for all its layers, and what lies between the calls of
blocks. Parameters are inputs of every piece, so layers share one compilation, and so do adapters of the same shapes. A
graph without blocks is compiled as a whole.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch._functorch import config as partitioner
from torch.fx import Graph, GraphModule, Node

from .blocks import blocks_of, is_block_call
from .regions import Region, is_size
from .rooted import CAPTURED, over

_SMALL = 3  # so few operators between two blocks run as they are


class Backend:
    """A `torch.compile` backend, told how much to keep for backward. Counts what it compiles.

    `budget` is AOTAutograd's activation memory budget, 0 (recompute all) to 1. By default what norms and activations
    give is recomputed where backward needs it: that is as cheap as reading it.
    """

    def __init__(self, name: str, budget: float | None = None):
        self.compile = lookup_backend(name)
        self.settings: dict[str, Any] = {"ban_recompute_materialized_backward": False}
        if budget is not None:
            self.settings["activation_memory_budget"] = budget
        self.compiled = 0

    def __call__(self, gm: GraphModule, inputs: Any, **options: Any) -> Callable[..., Any]:
        self.compiled += 1
        with partitioner.patch(self.settings):
            return self.compile(gm, inputs, **options)


def lower(gm: GraphModule, backend: str, budget: float | None = None) -> tuple[Callable[..., Any], Backend | None]:
    """The callable that serves calls of `gm`, and the backend it is compiled by, if any.

    `backend` is "eager", a `torch.compile` backend, or "auto": Inductor where the graph's parameters are on CUDA, the
    graph as it is elsewhere. Sizes stay dynamic.
    """
    if backend == "auto":
        backend = "inductor" if any(p.is_cuda for p in gm.parameters()) else "eager"
    if backend == "eager":
        return gm, None
    chosen = Backend(backend, budget)
    if not blocks_of(gm):
        return torch.compile(gm, backend=chosen, dynamic=True), chosen
    return _in_pieces(gm, chosen), chosen


def _in_pieces(gm: GraphModule, backend: Backend) -> GraphModule:
    """The outer graph with compiled pieces in it; it reads parameters from the same tree."""
    pieces = copy.copy(gm.get_submodule(CAPTURED))
    pieces.__dict__["_modules"] = dict(pieces._modules)
    for block in blocks_of(gm):
        pieces._modules[block.meta["name"]] = CompiledBlock(block, backend)
    graph = Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    graph.set_codegen(gm.graph._codegen)
    for number, run in enumerate(_between_blocks(graph)):
        _replace(graph, Region("", tuple(run)), f"between_{number}", pieces, backend)
    return over(graph, gm, pieces)


def _replace(graph: Graph, run: Region, name: str, pieces: nn.Module, backend: Backend) -> None:
    """Put one call of a compiled function where a run of operators was."""
    inner, copies = Graph(), {}
    for node in run.inputs:
        copies[node] = inner.placeholder(node.name)
    for node in run.nodes:
        copies[node] = inner.node_copy(node, copies.__getitem__)
    inner.output(tuple(copies[node] for node in run.outputs))
    pieces.add_module(name, _Compiled(GraphModule(nn.Module(), inner), backend))
    with graph.inserting_after(run.nodes[-1]):
        call = graph.call_module(f"{CAPTURED}.{name}", run.inputs)
    before = call
    for number, node in enumerate(run.outputs):
        with graph.inserting_after(before):
            before = graph.call_function(operator.getitem, (call, number))
        node.replace_all_uses_with(before)
    for node in reversed(run.nodes):
        graph.erase_node(node)


class _Compiled(nn.Module):
    """A module that runs a compiled graph without parameters."""

    def __init__(self, gm: GraphModule, backend: Backend):
        super().__init__()
        self.__dict__["compiled"] = torch.compile(gm, backend=backend, dynamic=True)

    def forward(self, *inputs: Any) -> Any:
        return self.__dict__["compiled"](*inputs)


class CompiledBlock(_Compiled):
    """A block whose parameters are inputs of one compiled function, for every layer."""

    def __init__(self, block: GraphModule, backend: Backend):
        lifted, paths = _lifted(block.graph)
        super().__init__(lifted, backend)
        self.reads = [(path.split(".")[:-1], path.rpartition(".")[2]) for path in paths]

    def forward(self, layer: nn.Module, *inputs: Any) -> Any:
        return super().forward(*[_read(layer, *path) for path in self.reads], *inputs)


def _read(layer: Any, owners: list[str], name: str) -> Tensor:
    """An attribute of a layer; most are parameters, and this is faster than by `getattr`."""
    for atom in owners:
        layer = layer._modules[atom]
    found = layer._parameters.get(name)
    return getattr(layer, name) if found is None else found


def _lifted(graph: Graph) -> tuple[GraphModule, list[str]]:
    """A graph with an input for each attribute that it reads, before its own inputs; and the attributes' paths."""
    lifted, copies = Graph(), {}
    paths = list(dict.fromkeys(str(node.target) for node in graph.find_nodes(op="get_attr")))
    read = {path: lifted.placeholder(path.replace(".", "_")) for path in paths}
    for node in graph.nodes:
        if node.op == "get_attr":
            copies[node] = read[str(node.target)]
        else:
            copies[node] = lifted.node_copy(node, copies.__getitem__)
    return GraphModule(nn.Module(), lifted), paths


def _between_blocks(graph: Graph) -> list[list[Node]]:
    """Runs of operators that nothing interrupts: no block, no region of other modes, no guard."""
    runs: list[list[Node]] = [[]]
    for node in graph.nodes:
        if is_block_call(node) or node.op == "call_module" or isinstance(node.target, torch._ops.HigherOrderOperator):
            runs.append([])
        elif is_size(node):
            if not set(node.all_input_nodes).isdisjoint(runs[-1]):  # it is computed from values
                runs.append([])
        elif node.op == "call_function" and not _is_part(node):
            runs[-1].append(node)
    return [run for run in runs if len(run) > _SMALL]


def _is_part(node: Node) -> bool:
    """Whether a node takes one of several results of something that runs as it is."""
    source = node.args[0] if node.args else None
    interrupts = isinstance(source, Node) and (
        is_block_call(source) or isinstance(source.target, torch._ops.HigherOrderOperator)
    )
    return getattr(node.target, "__name__", "") == "getitem" and interrupts
