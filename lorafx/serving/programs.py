"""Programs: what serves each kind of call, kept by call key, the least recently used making room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule

from ..lowering.lower import Lowered
from ..ops.deferral import describe_loss
from ..pipeline.step import Step
from .call_key import COUNTER, CallKey


@dataclass
class Program:
    """What serves a kind of call, and how it came about: a rewritten graph, or (`gm` is None) the model by sites."""

    title: str
    key: CallKey
    names: tuple[str, ...]
    why: str
    gm: GraphModule | None = None
    lowered: Lowered | None = None
    reason: str = ""
    steps: tuple[Step, ...] = ()
    seconds: float = 0.0
    hits: int = 0
    failed: bool = False  # to be captured, as opposed to: it was never tried
    changes: bool = False  # the model's attributes, which is why

    @property
    def loss(self) -> str:
        """How the loss is computed, if there is one and a graph."""
        return describe_loss(self.gm) if self.gm else ""

    @property
    def free(self) -> list[int]:
        """The leaves that are integers and may be any other."""
        return [number for number, leaf in enumerate(self.key.leaves) if leaf == COUNTER]


class Kept(OrderedDict[Hashable, list[Any]]):
    """What serves, by key, several where sizes differ; the least recently used makes room beyond `capacity`."""

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.dropped = capacity, 0

    def of(self, key: Hashable) -> Sequence[Any]:
        """What is kept for a key, which counts as used now."""
        kept = self.get(key)
        if kept is None:
            return ()
        self.move_to_end(key)
        return kept

    def keep(self, key: Hashable, served_by: Any) -> None:
        """Keep one more."""
        self.setdefault(key, []).append(served_by)
        self.move_to_end(key)
        while len(self) > 1 and sum(map(len, self.values())) > self.capacity:
            self.dropped += len(self.popitem(last=False)[1])

    def forget(self, served_by: Any) -> None:
        """Keep this no longer."""
        for key, kept in list(self.items()):
            if served_by in kept:
                kept.remove(served_by)
                if not kept:
                    del self[key]
