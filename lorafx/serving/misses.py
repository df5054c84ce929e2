"""Misses: in what a new kind of call differs from those that are kept, and what keeps differing."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable

from .call_key import differences
from .programs import Program
from .tree_state import ANY, Layout

OFTEN = 4  # so many captures for one thing alone are too many


class Misses:
    """Counts what made a capture necessary, where that was one thing alone."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.arguments: Counter[str] = Counter()
        self.attributes: Counter[str] = Counter()

    def explain(self, program: Program, kept: Iterable[Program]) -> tuple[str, str]:
        """Why a new program is needed, by the most similar one that is kept; and a reason against a graph, if any.

        An argument's constant that keeps changing is warned of. A model whose attributes keep changing goes by sites,
        where its own Python reads them, so that no graph is captured in each step.
        """
        same_part = [other for other in kept if other.key.part == program.key.part]
        found = [self._differences(program, other) for other in same_part]
        if not found:
            return "the first call", ""
        arguments, attributes = min(found, key=lambda both: len(both[0]) + len(both[1]))
        if not arguments and not attributes:
            return "other sizes than the kept graph serves", ""
        if len(arguments) == 1 and not attributes:
            self._count_constant(program, arguments[0].partition(":")[0])
        if not arguments:
            self.attributes.update(attributes)
        every = [*arguments, *(f"the attribute {name}" for name in attributes)]
        more = [f"and {len(every) - 3} more"] if len(every) > 3 else []
        often = next((name for name in attributes if self.attributes[name] > OFTEN), None)
        reason = f"the attribute {often} keeps changing, and a graph has it as a constant" if often else ""
        return "; ".join([*every[:3], *more]), reason

    def _differences(self, program: Program, other: Program) -> tuple[list[str], list[str]]:
        new, old = program.key.attributes, other.key.attributes
        changed = list(self.layout.watch.changes(new, old)) if ANY not in (new, old) and new != old else []
        return list(differences(program.key, program.names, other.key, other.names)), changed

    def _count_constant(self, program: Program, name: str) -> None:
        if name not in program.names or len(program.key.leaves[program.names.index(name)]) != 2:
            return
        self.arguments[name] += 1
        if self.arguments[name] == OFTEN:
            warnings.warn(
                f"the argument {name} has had {OFTEN + 1} values so far, and a graph is captured for each. Pass it as "
                "a tensor, or as one value, to capture once."
            )
