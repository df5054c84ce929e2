"""By sites: a call runs the model's own Python, and the adapters act where that reads a weight."""

from __future__ import annotations

from typing import Any

from ..adapters.by_row import ROWS
from ..pipeline import Observer, Pipeline
from .before import Before
from .call_key import Call, CallKey
from .choosing import has_one_token
from .direct import Direct, equation_dtype
from .interpret import interpret
from .per_site import Outside, Run, SiteInterpreter, Sites
from .site_graphs import SiteGraphs
from .site_policy import SitePolicy
from .site_table import SiteTable, SiteTables
from .tree_state import TreeGuards, TreeState

LOOKS = 2  # so many calls of a kind are looked at: what the first keeps of a weight, the second may read


class BySites:
    """Runs calls of one adapted model by sites, with `tables` of where these are and the graphs of some `operators`.

    `runs_equations` says whether the equations themselves do what the pipeline makes of them, and nobody watches it.
    """

    def __init__(self, pipeline: Pipeline, observers: tuple[Observer, ...], tree: TreeGuards, policy: SitePolicy):
        self.tree, self.policy = tree, policy
        self.tables, self.operators = SiteTables(), SiteGraphs(pipeline, observers)
        self.runs_equations = pipeline.exact and "adapters" in pipeline.facts and not observers
        self.dtype = equation_dtype(pipeline)

    def forget(self, adapter: str) -> None:
        """Forget what was made for calls in which an adapter acts, which is deleted."""
        self.tables.forget(adapter)
        self.operators.forget(adapter)

    def run(
        self,
        call: Call,
        step_into: Run,
        early: bool,
        new: CallKey | None = None,
        starts_anew: bool = False,
        turned: bool = False,
    ) -> tuple[Any, bool]:
        """What a call gives, and whether it ran a site. `step_into` is what a part does that the model calls.

        `early` says that such calls have no graph yet. `new` is the key of one of the first calls of a kind: all its
        functions are looked at, unless adapters of this form, whatever their names, have had so many such calls.
        `starts_anew` says that whoever calls starts anew on `RunAgain`. Rows may be `turned` until they were seen.
        """
        state = self.tree.latest(call.tree) if early else self.tree.state(call.tree)
        table = self._table(call, state)
        direct = None
        if self.runs_equations:
            direct = Direct(call.tree, table, self.dtype, call.kwargs.get(ROWS), has_one_token(call), turned)
        outside = Outside(self.operators.run, step_into, self.policy.ran(state.layout, early))
        kind = None if new is None else new.with_any_names()
        is_new = kind is not None and table.looked_at[kind] < LOOKS
        interpreter = SiteInterpreter(call, Sites(state, table, direct), outside, is_new, starts_anew)
        result = interpret(interpreter, call)
        if is_new:
            table.looked_at[kind] += 1
        return result

    def before(self, call: Call, key: CallKey) -> Before | None:
        """What a call with this key may change; None if it is none of the first, which may have to run once more."""
        looked_at = self._table(call, self.tree.latest(call.tree)).looked_at
        return Before.of(call, self.tree) if looked_at[key.with_any_names()] < LOOKS else None

    def knows_equations(self, call: Call) -> bool:
        """Whether equations are known for all that a call may read a weight by, however its modules read theirs."""
        return self._table(call, self.tree.latest(call.tree)).is_plain

    def _table(self, call: Call, state: TreeState) -> SiteTable:
        return self.tables.of(call.tree, call.context, state.modules)
