"""Settling: models that change themselves the first time they run, as one that prepares a table and keeps it does.

A call that changes attributes of the model cannot be a graph, which would not change them. But after the first such
call the model may be done: what its own Python has prepared is there when the next one comes, and that can be a graph.
"""

from __future__ import annotations

from .call_key import CallKey
from .programs import Program


class Settling:
    """Remembers which kinds of call could not be graphs, whatever the model's attributes were."""

    def __init__(self) -> None:
        self._refused: set[CallKey] = set()

    def may_be_done(self, program: Program) -> bool:
        """Whether to try a graph again: this one failed as the model changed itself, for the first time."""
        key = program.key.with_any_attributes()
        first = program.changes_model and key not in self._refused
        self._refused.add(key)
        return first
