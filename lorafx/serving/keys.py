"""Keys: what the calls of one adapted model are told apart by, as far as is known to make a difference."""

from __future__ import annotations

from typing import NamedTuple

from .call_key import Call, CallKey
from .free_counters import FreeCounters
from .site_policy import SitePolicy
from .tree_state import TreeGuards


class Keys(NamedTuple):
    """The keys of calls in a tree whose state `tree` knows, as programs are kept by them.

    Graphs may take any number in the place of some integers (`counters`), and calls that go by sites any attributes of
    the model (`sites`).
    """

    tree: TreeGuards
    counters: FreeCounters
    sites: SitePolicy

    def of(self, call: Call) -> CallKey:
        """The key of a call, in the state that the tree has now."""
        return self.applied(CallKey.of(call, self.tree.state(call.tree)))

    def applied(self, key: CallKey) -> CallKey:
        """A key without what is known, by now, to make no difference."""
        return self.sites.applied(self.counters.applied(key))
