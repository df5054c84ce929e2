"""Direct: a graph that runs eagerly calls lorafx's operators as the Python functions they are.

As `torch.ops.lorafx.…` each call goes through torch's dispatcher and back, which on a CPU takes as long as a small
product does. Compilers and whoever reads the graph want the operators; this is for what runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

from . import ops
from .blocks import blocks_of
from .rooted import copied

_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    getattr(torch.ops.lorafx, name).default: getattr(ops, name) for name in ops.__all__
}


def direct(gm: GraphModule) -> GraphModule:
    """A graph over the same tree that calls the functions; the given one stays as it is."""
    other = copied(gm, gm)
    for each in (other, *blocks_of(other)):
        for node in each.graph.nodes:
            node.target = _FUNCTIONS.get(node.target, node.target)
        each.recompile()
    return other
