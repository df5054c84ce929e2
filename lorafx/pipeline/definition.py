"""What a pass is: a frozen dataclass with one method, whose fields are its options."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from .context import Context


@dataclass(frozen=True)
class Pass:
    """One graph transformation. A subclass is a frozen dataclass whose fields are its options.

    `requires` and `establishes` name facts about the graph; a pipeline checks its order from them. A pass keeps no
    state: what it decides goes into the graph and its nodes' `meta`. Its `name` is the class's in snake case, unless
    given; a subclass that is defined is known to `Pipeline.parse` by it. `str(p)` is `name{option=value}`.

    `exact` says that afterwards the graph computes what it did before, up to rounding. With such passes alone, a call
    may be served by the model's own Python before there is a graph for it.
    """

    name: ClassVar[str] = ""
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset()
    exact: ClassVar[bool] = False
    known: ClassVar[dict[str, type[Pass]]] = {}

    def __init_subclass__(cls) -> None:
        cls.name = cls.__dict__.get("name") or re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
        cls.requires, cls.establishes = frozenset(cls.requires), frozenset(cls.establishes)
        Pass.known[cls.name] = cls

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        """Change `gm.graph` in place and return how many rewrites were made.

        Called on the graph and then on each of its blocks, with paths in `context` relative to what `gm` is over.
        """
        raise NotImplementedError

    def __str__(self) -> str:
        options = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default
        }
        text = ", ".join(f"{name}={value!r}" for name, value in options.items())
        return f"{self.name}{{{text}}}" if text else self.name
