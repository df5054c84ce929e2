"""What torch.fx and torch.export keep in operators, nodes and graphs, and do not document."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

# What torch.export calls the module that checks a graph's sizes. Without it, graphs would serve sizes they do not fit.
GUARDS = "_guards_fn"

# Lets a graph module write its code when it is first called. Without it, capture would write code that nobody runs.
use_lazy_graph_module = _use_lazy_graph_module

# torch's activations and attention, written in C; `torch.nn.functional` has them in Python. Without it, eager graphs
# would call operators, which takes longer. It also takes one tensor apart into many by one call, as replays do.
C_FUNCTIONS = torch._C._nn


def schema_of(target: Any) -> Any:
    """An operator's signature, None for other functions. Without it, nobody would know what operators write to."""
    return getattr(target, "_schema", None)


def name_of(target: Any) -> str | None:
    """An operator's name without its overload. Without it, new nodes would be called `linear_default`."""
    return getattr(target, "_opname", None)


def is_vmap_bracket(target: Any) -> bool:
    """Whether a function opens or closes a vmap in a graph. Without it, these would be dropped as unused."""
    return getattr(target, "__module__", "") == "torch._functorch.predispatch"


def is_erased(node: Node) -> bool:
    """Whether a node was taken out of its graph. Without it, a pass would rewrite what it has just replaced."""
    return node._erased


def codegen_of(graph: Graph) -> CodeGen:
    """How a graph takes its inputs and gives its output. Without it, a copy could not be called like the model."""
    return graph._codegen


def set_unused_graph(gm: GraphModule, graph: Graph) -> None:
    """Give a module a graph that is printed and never called. Without it, Python would compile each copy's code."""
    gm._graph = graph


def output_spec_of(gm: GraphModule) -> pytree.TreeSpec:
    """How a captured graph's flat outputs make its output. Without it, graphs could not be called with flat inputs."""
    spec = gm._out_spec
    assert spec is not None, "torch.export says how a call's leaves make its output"
    return spec


def home_of(function: Any) -> str:
    """The module of the class whose `backward` a node of autograd's history runs; empty for a function of torch in C++.

    Without it, a checkpoint whose parameters autograd does not see would be taken for one that has none.
    """
    in_python = isinstance(function, torch.autograd.function.BackwardCFunction)
    return getattr(function, "_forward_cls", type(function)).__module__ if in_python else ""


def node_at(gm: GraphModule, line: int) -> Node | None:
    """The node whose code is at a line of what runs the graph. Without it, an error would name a line nobody wrote."""
    number = gm._lineno_map.get(line - gm._prologue_start)
    return None if number is None else next((n for at, n in enumerate(gm.graph.nodes) if at == number), None)
