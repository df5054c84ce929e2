"""Step: what one pass did to one graph."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """What one pass did to one graph.

    `sites` is the number of sites that the graph is known to run after the pass, `parameters_added` that of elements in
    tensors that it reads since. These and `rewrites` count a block once for each layer that runs it.
    """

    name: str
    rewrites: int
    sites: int
    nodes_before: int
    nodes_after: int
    parameters_added: int
    milliseconds: float
