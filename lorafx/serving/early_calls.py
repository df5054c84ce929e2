"""Early calls: interpret first, and capture what repeats.

A graph takes seconds to make, and most kinds of call never come often enough to be worth it. So a call of a new kind is
served at once by the model's own Python, with the adapters' equations at its sites (`direct`). When its kind has come
`REPEATS` times, it is given a graph. That such calls are counted, and not timed, makes a run repeatable: losses do not
depend on how busy the machine was.
"""

from __future__ import annotations

from collections import Counter

from .call_key import FREE_COUNTER, CallKey
from .free_counters import is_counter

# Calls of a kind that are served without a graph. Capture and passes cost what a graph saves in so many calls: some 60
# when a decoder of 32 layers of width 128 decodes and 90 when it trains, 150 and 400 with 8 layers of 512, 1,000 of a
# toy, whose graph takes half a second. Who pays when he has lost as much by not paying takes twice as long as the best
# choice would have, at worst; so it is a number at the lower end of these, where seconds are at stake.
REPEATS = 100


class EarlyCalls:
    """Which kinds of call have come how often, and which are graphs from the next call on.

    None is served early, without a graph, unless that is `allowed`.
    """

    def __init__(self, allowed: bool) -> None:
        self._allowed = allowed
        self._seen: Counter[CallKey] = Counter()
        self._at_once: set[CallKey] = set()

    @property
    def are_allowed(self) -> bool:
        """Whether calls of a new kind may be served without a graph."""
        return self._allowed and REPEATS > 0

    def count(self, key: CallKey) -> None:
        """Note that such a call was served."""
        self._seen[_kind(key)] += 1

    def is_due(self, key: CallKey) -> bool:
        """Whether such calls have come often enough for a graph, or must have one."""
        kind = _kind(key)
        return kind in self._at_once or self._seen[kind] >= REPEATS

    def seen(self, key: CallKey) -> int:
        """How many such calls have been served early."""
        return self._seen[_kind(key)]

    def left(self, key: CallKey) -> int:
        """How many more such calls are served without a graph."""
        return REPEATS - self.seen(key)

    def forget(self, adapter: str) -> None:
        """Forget the calls in which an adapter acted, which is deleted."""
        for key in [key for key in tuple(self._seen) if key.has(adapter)]:
            del self._seen[key]
        self._at_once = {key for key in self._at_once if not key.has(adapter)}

    def give_up(self, key: CallKey) -> None:
        """Give such calls their graph at once: the model's own Python reads a weight where no equation can be run."""
        self._at_once.add(_kind(key))


def _kind(key: CallKey) -> CallKey:
    """The key of all calls that may turn out to share a graph: a graph may take any counter, and any attributes."""
    leaves = tuple(FREE_COUNTER if is_counter(leaf) else leaf for leaf in key.leaves)
    return key._replace(leaves=leaves, attributes=None)
