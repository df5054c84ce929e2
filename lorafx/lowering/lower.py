"""Lower: a rewritten graph becomes what runs, the graph itself or a compiled form of it.

A graph with blocks is compiled in pieces: each block once for all its layers, and what lies between the calls of
blocks. Parameters are inputs of every piece, so layers share one compilation; a piece that is like an earlier one, as
those of another adapter of the same shapes are, is that one. What a graph defers stays between pieces too: it is not
to be computed. A graph without either is compiled as a whole.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from ..errors import ConfigError
from ..graph.blocks import LAYERS, blocks_of, is_block_call, is_of_block
from ..graph.modules import CAPTURED, by_leaves
from ..graph.regions import Region, is_size, signature
from ..ops.deferred import heads, is_deferral
from ..torch_private.compilers import (
    ACTIVATION_BUDGET,
    KEEP_MATERIALIZED,
    POST_PASS,
    CustomGraphPass,
    aot_autograd,
    inductor,
    inductor_modes,
    lookup_backend,
    recompile_reason,
    settings_of_mode,
)
from ..torch_private.graphs import output_spec_of
from .eager import direct
from .in_place_sums import SumsInPlace
from .onednn_products import ProductsByOnednn

_SMALL = 3  # so few operators between two blocks run as they are


@dataclass(frozen=True)
class Backend:
    """How graphs are compiled: by whom, in which of Inductor's modes, with which activation memory budget.

    `name` is "eager", a `torch.compile` backend, or "auto": Inductor where the graph's parameters are on CUDA, the
    graph as it is elsewhere. `mode` is one of `torch._inductor.list_mode_options()`. `budget` is AOTAutograd's, from 0
    (recompute all) to 1 (keep all that it would keep by itself); None is that without norms and activations. Raises
    `ConfigError` for what is none of these.
    """

    name: str = "auto"
    mode: str | None = None
    budget: float | None = None

    def __post_init__(self) -> None:
        if self.budget is not None and not 0 <= self.budget <= 1:
            raise ConfigError(f"activation_budget={self.budget!r} is not between 0 and 1")
        if self.mode is None:
            return
        if self.name not in ("auto", "inductor"):
            raise ConfigError(f"mode={self.mode!r} is one of Inductor's, and backend={self.name!r} has none")
        if self.mode not in (known := inductor_modes()):
            raise ConfigError(f"mode={self.mode!r} is none of {', '.join(known)}")

    def on(self, gm: GraphModule) -> str:
        """The name of what compiles this graph."""
        on_cuda = self.name == "auto" and any(p.is_cuda for p in gm.parameters())
        return "inductor" if on_cuda else self.name.replace("auto", "eager")


class Piece:
    """One function that is compiled, how often it has been, and torch's reasons for each time after the first."""

    def __init__(self, title: str, function: Callable[..., Any], compiler: str, backend: Backend):
        self.title, self.compiled = title, 0
        self.reasons: list[str] = []
        self._backend = lookup_backend(compiler)
        # What norms and activations give is recomputed where backward needs it, unless there is room for everything.
        self._settings: dict[str, Any] = {KEEP_MATERIALIZED: backend.budget == 1}
        if backend.budget is not None:
            self._settings[ACTIVATION_BUDGET] = backend.budget
        self._options: dict[str, Any] = {"config_patches": _patches(backend.mode)} if compiler == "inductor" else {}
        self.run = torch.compile(function, backend=self._compile, dynamic=True)

    def _compile(self, gm: GraphModule, inputs: Any, **options: Any) -> Callable[..., Any]:
        self.compiled += 1
        if self.compiled > 1:
            self.reasons.append(_reason())
        with aot_autograd.patch(self._settings):
            return self._backend(gm, inputs, **options, **self._options)


def _patches(mode: str | None) -> dict[str, Any]:
    """What is set of Inductor's configuration while it compiles a piece; a pass that somebody has set stays."""
    settings: dict[str, Any] = settings_of_mode(mode) if mode else {}
    return {POST_PASS: getattr(inductor, POST_PASS) or OurPasses()} | settings


class OurPasses(CustomGraphPass):
    """What runs after Inductor's own passes on ATen operators."""

    _passes = ProductsByOnednn(), SumsInPlace()

    def __call__(self, graph: Graph) -> None:
        for each in self._passes:
            each(graph)

    def uuid(self) -> Any:
        return [each.uuid() for each in self._passes]


def _reason() -> str:
    """Why torch compiles a function again, while it does."""
    reason = recompile_reason() or "torch does not say why"
    return " ".join(str(reason).split())


class Lowered(NamedTuple):
    """What serves calls of a graph, from a call's leaves to its output's, and how these make the output."""

    graph: GraphModule  # over the same tree
    run: Callable[..., Any]  # the graph itself, or a compiled form of it
    output: pytree.TreeSpec


class Lowering:
    """What compiles graphs for one adapted model, and the pieces it has compiled. Sizes stay dynamic."""

    def __init__(self, backend: Backend):
        self.backend = backend
        self.pieces: dict[Hashable, Piece] = {}

    def lower(self, gm: GraphModule) -> Lowered:
        """What serves calls of `gm`."""
        compiler, output = self.backend.on(gm), output_spec_of(gm)
        if compiler == "eager":
            graph = direct(gm)
        elif blocks_of(gm) or heads(gm):
            graph = self._in_pieces(gm, compiler)
        else:
            graph = by_leaves(gm)
            whole = self.pieces[id(graph)] = Piece("whole graph", graph, compiler, self.backend)
            return Lowered(graph, whole.run, output)
        return Lowered(graph, graph, output)

    def _in_pieces(self, gm: GraphModule, compiler: str) -> GraphModule:
        """The outer graph with compiled pieces in it; it reads parameters from the same tree."""
        outer = by_leaves(gm)
        graph, pieces = outer.graph, outer.get_submodule(CAPTURED)
        for block in blocks_of(gm):
            title = f"{len(block.meta[LAYERS])} layers, {block.meta[LAYERS][0]} first"
            lifted, paths = _lifted(block.graph)
            pieces._modules[block.meta["name"]] = CompiledBlock(self._piece(title, lifted, compiler), paths)
        for number, run in enumerate(_between_blocks(graph)):
            inner, region = Graph(), Region("", tuple(run))
            _fill(inner, region)
            name = f"between_{number}"
            pieces.add_module(name, Compiled(self._piece(f"{len(run)} operators outside layers", inner, compiler)))
            _replace(graph, region, name)
        outer.recompile()
        return outer

    def _piece(self, title: str, graph: Graph, compiler: str) -> Piece:
        key = compiler, signature(graph.find_nodes(op="placeholder"), graph.nodes)
        if key not in self.pieces:
            self.pieces[key] = Piece(title, GraphModule(nn.Module(), graph), compiler, self.backend)
        return self.pieces[key]


class Compiled(nn.Module):
    """A module that runs a piece."""

    def __init__(self, piece: Piece):
        super().__init__()
        self.__dict__["piece"] = piece

    def forward(self, *inputs: Any) -> Any:
        return self.__dict__["piece"].run(*inputs)


class CompiledBlock(Compiled):
    """A block whose parameters are inputs of the piece, for every layer."""

    def __init__(self, piece: Piece, paths: list[str]):
        super().__init__(piece)
        self.reads = [(path.split(".")[:-1], path.rpartition(".")[2]) for path in paths]

    def forward(self, layer: nn.Module, *inputs: Any) -> Any:
        return super().forward(*[_read(layer, *path) for path in self.reads], *inputs)


def _read(layer: Any, owners: list[str], name: str) -> Tensor:
    """An attribute of a layer; most are parameters, and this is faster than by `getattr`."""
    for atom in owners:
        layer = layer._modules[atom]
    found = layer._parameters.get(name)
    return getattr(layer, name) if found is None else found


def _lifted(graph: Graph) -> tuple[Graph, list[str]]:
    """A graph with an input for each attribute that it reads, before its own inputs; and the attributes' paths."""
    lifted = Graph()
    copies: dict[Node, Node] = {}
    reads = {str(node.target): node for node in graph.find_nodes(op="get_attr")}
    inputs = {path: _placeholder(lifted, path.replace(".", "_"), node) for path, node in reads.items()}
    for node in graph.nodes:
        known = inputs.get(str(node.target)) if node.op == "get_attr" else None
        copies[node] = known or lifted.node_copy(node, copies.__getitem__)
    return lifted, list(reads)


def _fill(inner: Graph, run: Region) -> None:
    """Write a run of operators into a graph of its own."""
    copies = {node: _placeholder(inner, node.name, node) for node in run.inputs}
    for node in run.nodes:
        copies[node] = inner.node_copy(node, copies.__getitem__)
    inner.output(tuple(copies[node] for node in run.outputs))


def _placeholder(graph: Graph, name: str, like: Node) -> Node:
    node = graph.placeholder(name)
    node.meta["val"] = like.meta.get("val")
    return node


def _replace(graph: Graph, run: Region, name: str) -> None:
    """Put a call of the captured module `name` where a run of operators was."""
    outputs = run.outputs
    with graph.inserting_after(run.nodes[-1]):
        before = call = graph.call_module(f"{CAPTURED}.{name}", run.inputs)
    for number, node in enumerate(outputs):
        with graph.inserting_after(before):
            before = graph.call_function(operator.getitem, (call, number))
        node.replace_all_uses_with(before)
    for node in reversed(run.nodes):
        graph.erase_node(node)


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
    region = isinstance(node.target, torch._ops.HigherOrderOperator)
    return region or node.op == "call_module" or is_block_call(node) or is_deferral(node)


def _is_part(node: Node) -> bool:
    """Whether a node takes one of several results of something that runs as it is."""
    source = node.args[0] if node.target is operator.getitem else None
    return is_of_block(node) or (isinstance(source, Node) and isinstance(source.target, torch._ops.HigherOrderOperator))
