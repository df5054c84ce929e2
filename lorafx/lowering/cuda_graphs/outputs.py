"""Outputs: which tensors of a recording an output is made of, and the same output made of other tensors.

The tensors that a replay writes lie where they were when it was recorded, and the next replay writes them again. So
each call's output is made of copies. What is an argument of the call, or a parameter, is that of the call at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ...ops.deferral import Deferred, deferred_again

Make = Callable[[Sequence[Any], Sequence[Tensor]], Any]  # a value of a call's tensors and of what a replay computed


class Outputs:
    """How the leaves of a call's output are made.

    `given` says of which of a call's tensors a tensor of the recording is the stand-in, by `id`. `computed` are the
    others that the output needs, each once.
    """

    def __init__(self, leaves: Sequence[Any], given: Mapping[int, int]):
        self._given, self._places = given, {}  # type: ignore[var-annotated]
        self.computed: list[Tensor] = []
        self._makes = [self._make(leaf) for leaf in leaves]

    def make(self, given: Sequence[Any], computed: Sequence[Tensor]) -> list[Any]:
        """The leaves of the output of a call that has the tensors `given`, from what a replay has computed for it."""
        return [make(given, computed) for make in self._makes]

    def _make(self, value: Any) -> Make:
        if isinstance(value, Deferred):
            inputs, again = deferred_again(value)
            makes = [self._make(each) for each in inputs]
            return lambda given, computed: again([make(given, computed) for make in makes])
        if not isinstance(value, Tensor):
            return lambda given, computed: value
        number = self._given.get(id(value))
        if number is not None:
            return lambda given, computed: given[number]
        place = self._places.setdefault(id(value), len(self.computed))
        if place == len(self.computed):
            self.computed.append(value)
        return lambda given, computed: computed[place]
