"""What `report()` and `explain()` of an adapted model return: values that print as tables."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from ..pipeline import Step
from ..tables import InNotebooks, table


@dataclass(frozen=True)
class Report(InNotebooks):
    """What the pipeline did to each captured graph, and the memory that merging takes. Prints as tables.

    `graphs` are each graph's steps by its title; `merged` maps a weight's path to the bytes kept for it and its own,
    `lost` that of a quantised one to the share of it, merged, that its bits cannot hold (by the Frobenius norm).
    """

    graphs: dict[str, tuple[Step, ...]] = field(default_factory=dict)
    sites: int = 0
    merged: dict[str, tuple[int, int]] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        columns = ("pass", "rewrites", "sites", "nodes before", "nodes after", "parameters added", "ms")
        parts = [f"{self.sites} sites, {len(self.graphs)} graphs"]
        for title, steps in self.graphs.items():
            parts.append(table(title, columns, [dataclasses.astuple(step) for step in steps]))
        if self.merged:
            totals = tuple(map(sum, zip(*self.merged.values())))
            shares = [
                (name, kept, size, f"{100 * kept / size:.1f} %", f"{self.lost[name]:.2%}" if name in self.lost else "")
                for name, (kept, size) in [*self.merged.items(), ("in all", totals)]
            ]
            parts.append(table("merged weights", ("weight", "bytes kept", "weight bytes", "share", "lost"), shares))
        return "\n".join(parts)


@dataclass(frozen=True)
class Call:
    """A kind of call, and what serves it: "graph", or "sites" for the `reason` given.

    `early` counts the calls that were served by sites before there was a graph, `hits` those that a graph, or what is
    there instead, has served after its first. `why` says in what the call differed from earlier ones, `loss` how the
    loss is computed, `cuda_graph` how many calls a CUDA graph was launched for, or why none is, and `waits_for` how
    many more such calls go by sites before a graph is made.
    """

    title: str
    served_by: str
    hits: int
    capture_seconds: float
    why: str
    reason: str = ""
    loss: str = ""
    cuda_graph: str = ""
    early: int = 0
    waits_for: int = 0


@dataclass(frozen=True)
class Explanation(InNotebooks):
    """What serves each kind of call, the longest unused first. Prints as a table.

    `operators` counts the one-site graphs that calls by sites use, `dropped` the programs that were dropped because too
    many were kept. `compiled` lists each compiled piece, how often it was compiled, and torch's reasons for doing it
    again.
    """

    calls: tuple[Call, ...] = ()
    operators: int = 0
    dropped: int = 0
    compiled: tuple[tuple[str, int, str], ...] = ()

    def __str__(self) -> str:
        columns: dict[str, list[Any]] = {
            "call": [call.title for call in self.calls],
            "served by": [call.served_by for call in self.calls],
            "early": [call.early for call in self.calls],
            "hits": [call.hits for call in self.calls],
            "graph in": [f"{call.waits_for} calls" if call.waits_for else "" for call in self.calls],
            "capture s": [call.capture_seconds for call in self.calls],
            "a new kind because of": [call.why for call in self.calls],
            "loss": [call.loss for call in self.calls],
            "CUDA graph": [call.cuda_graph for call in self.calls],
        }
        shown = {name: cells for name, cells in columns.items() if any(cells) or name not in ("graph in", "CUDA graph")}
        reasons = dict.fromkeys(f"by sites: {call.reason}" for call in self.calls if call.reason)
        counts = f"{len(self.calls)} kinds of call, {self.operators} one-site graphs, {self.dropped} programs dropped"
        pieces = [table("compiled pieces", ("piece", "times", "again because"), self.compiled)] if self.compiled else []
        return "\n".join([table(counts, tuple(shown), list(zip(*shown.values()))), *reasons, *pieces])
