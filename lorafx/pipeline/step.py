"""Step: what one pass did to one graph."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """What one pass did to one graph; `sites` is how many sites the graph is known to run afterwards."""

    name: str
    rewrites: int
    sites: int
    nodes_before: int
    nodes_after: int
    parameters_added: int
    milliseconds: float
