"""Programs: what serves each kind of call, kept by call key, the least recently used making room."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import nn
from torch.fx import GraphModule

from ..graph.masks.sizes import ONES
from ..graph.modules import copied
from ..lowering.lower import Lowered
from ..ops.deferral import describe_loss
from ..pipeline import Context, Step
from .call_key import FREE_COUNTER, CallKey

CAPACITY = 64  # programs that an adapted model keeps
T = TypeVar("T")


@dataclass(eq=False)
class Program:
    """What serves a kind of call: a rewritten graph, or where `gm` is None, the model's own Python, site by site."""

    title: str
    key: CallKey
    names: tuple[str, ...]  # what to call the tensors and constants of the call, one each
    positional: int = 0  # how many arguments of the call it was made for were given by position
    why: str = ""  # why it was made: in what its first call differed from earlier calls
    gm: GraphModule | None = None
    captured: GraphModule | None = None  # what `gm` was before the passes
    context: Context = field(default_factory=Context)  # what the passes were given
    lowered: Lowered | None = None
    reason: str = ""  # why it is no graph
    steps: tuple[Step, ...] = ()
    seconds: float = 0.0
    hits: int = 0  # calls that it served without being made for them
    acts: bool = True  # its graph, if it is one, has a site of the active adapters
    failed: bool = False  # capturing or rewriting a graph was tried, and failed
    waits: bool = False  # it has no graph yet, since such calls have not come often
    early: int = 0  # calls of this kind that were served before there was a graph
    told_rows: bool = False  # it has served, by sites, a call in which rows were told apart from what else has sizes
    changes_model: bool = False  # it failed because the call changes attributes of the model

    def to_rewrite(self, tree: nn.Module) -> GraphModule:
        """A copy of the captured graph, as the passes are given it."""
        assert self.captured is not None, "only what was captured can be rewritten"
        gm = copied(self.captured, tree)
        for node, name in zip(gm.graph.find_nodes(op="placeholder"), self.names):
            node.meta[ONES] = name in self.key.full
        return gm

    @property
    def loss(self) -> str:
        """How the loss is computed, and why it is not fused."""
        if self.gm is None:
            return "the model's own"
        # As trl's trainers call the decoder below the head, and compute a loss of what it gives.
        return describe_loss(self.gm) or f"none to fuse{': a part is called' if self.key.part else ''}"

    @property
    def launched(self) -> str:
        """How often a CUDA graph was launched for its calls, or why none is, where CUDA graphs were asked for."""
        return str(self.lowered.launched) if self.lowered else ""

    @property
    def free(self) -> list[int]:
        """The numbers of the leaves that are integers and may be any other."""
        return [number for number, leaf in enumerate(self.key.leaves) if leaf == FREE_COUNTER]


class GuardFailed(Exception):
    """The guards of a graph refuse the sizes of a call, before anything is computed."""


def guarded(run: Callable[..., Any], inputs: Sequence[Any]) -> Any:
    """What a graph gives for these inputs. Raises `GuardFailed` if it does not fit them."""
    try:
        return run(*inputs)
    except AssertionError as error:
        if str(error).startswith("Guard failed"):
            raise GuardFailed(str(error)) from error
        raise


class ProgramCache(Generic[T]):
    """Programs (or graphs) by key. A key may have several, for different sizes.

    Beyond `capacity` the least recently used keys make room, each with all it has; `dropped` counts what went. Several
    threads may use it.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity, self.dropped = capacity, 0
        self._kept: OrderedDict[Hashable, list[T]] = OrderedDict()
        self._lock = threading.RLock()

    def __iter__(self) -> Iterator[T]:
        with self._lock:
            return iter([program for kept in self._kept.values() for program in kept])

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._kept.values()))

    def of(self, key: Hashable) -> tuple[T, ...]:
        """What is kept for a key, which counts as used now."""
        with self._lock:
            kept = self._kept.get(key)
            if kept is None:
                return ()
            self._kept.move_to_end(key)
            return tuple(kept)

    def keep(self, key: Hashable, program: T) -> None:
        """Keep one more."""
        with self._lock:
            self._kept.setdefault(key, []).append(program)
            self._kept.move_to_end(key)
            while len(self._kept) > 1 and len(self) > self.capacity:
                self.dropped += len(self._kept.popitem(last=False)[1])

    def forget(self, program: T) -> None:
        """Keep this one no longer."""
        with self._lock:
            for key, kept in list(self._kept.items()):
                if program in kept:
                    kept.remove(program)
                    if not kept:
                        del self._kept[key]

    def forget_keys(self, are_gone: Callable[[Any], bool]) -> None:
        """Keep nothing any longer that has one of these keys."""
        with self._lock:
            for key in [key for key in self._kept if are_gone(key)]:
                del self._kept[key]

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._kept.clear()
