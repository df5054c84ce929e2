"""The program maker: what serves a new kind of call, and what serves it once it has come often.

A new kind may wait for its graph: until then the model's own Python serves it. What serves it for good is a graph, or
where there is a reason against one, or none can be made, the model's own Python after all.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from torch import nn

from ..capture.arguments import describe_call
from ..capture.process_use import ENVIRONMENT
from ..errors import CaptureError, UncoveredOperatorError
from ..torch_private.tensors import is_within_transform
from .acting import acts_in
from .adapted_modules import require_adapted_modules
from .by_sites import BySites
from .call_key import Call, CallKey
from .early_calls import EarlyCalls
from .graph_builder import CAPTURING, GraphBuilder
from .keys import Keys
from .misses import Misses, leaf_names
from .programs import Program, ProgramCache

WAITS = "a graph is made when such calls have come more often"


@dataclass
class ProgramMaker:
    """Makes the programs of one adapted model, and keeps them in `programs` by their `keys`.

    `graphs` makes their graphs. A program may wait for its own if its kind of call is allowed to be `early`, and
    `by_sites` can serve that meanwhile. `misses` knows in what kinds of call differ, and `fit`, by layout, the paths of
    modules that adapters can act on.
    """

    programs: ProgramCache[Program]
    keys: Keys
    graphs: GraphBuilder
    early: EarlyCalls
    by_sites: BySites
    misses: Misses = field(default_factory=Misses)
    fit: defaultdict[int, set[str]] = field(default_factory=lambda: defaultdict(set))

    def make(self, key: CallKey, call: Call, tried: int, may_wait: bool = True) -> Program:
        """Make and keep what serves a new kind of call, whose key has `tried` programs, none of which fits.

        Its graph waits if it `may_wait`, and nothing is known to need it at once.
        """
        with CAPTURING:
            kept = self.programs.of(key)
            if len(kept) > tried:
                return kept[-1]  # another thread has made it meanwhile
            require_adapted_modules(call, self.fit[key.layout])
            if may_wait and self._can_wait(key, call, tried):
                program = self._waiting(key, call)
            else:
                program = self._lasting(key, call)
                key = self.keys.of(call)  # as it is now: the model may have changed itself
            self.programs.keep(key, program)
            return program

    def promote(self, waiting: Program, call: Call) -> Program:
        """Put what serves a kind of call for good in the place of a program that has waited for its graph."""
        with CAPTURING:
            self.programs.forget(waiting)
            return self.make(self.keys.of(call), call, 0, may_wait=False)

    # --- a program that waits for its graph --------------------------------------------------------------------------

    def _can_wait(self, key: CallKey, call: Call, tried: int) -> bool:
        """Whether the model's own Python can serve a new kind of call until it has come more often."""
        if not self.early.are_allowed or tried:
            return False
        sites, state = self.keys.sites, self.keys.tree.latest(call.tree)
        if sites.is_a_graph(key.part) or sites.reason_against_a_graph(key, state, tried) or self.graphs.like(key, call):
            return False
        is_due = self.early.is_due(key) and not is_within_transform()
        return not is_due and self.by_sites.knows_equations(call)

    def _waiting(self, key: CallKey, call: Call) -> Program:
        program = Program(title_of(call), key, leaf_names(call), len(call.args), waits=True, reason=WAITS)
        program.why = self.misses.why(program, self.programs)
        return program

    # --- a program for good ------------------------------------------------------------------------------------------

    def _lasting(self, key: CallKey, call: Call) -> Program:
        sites, counters = self.keys.sites, self.keys.counters
        early, names = self.early.seen(key), leaf_names(call)
        if sites.capture != "sites":
            counters.learn(call, key, names, (program.key for program in self.programs))
        program = Program(title_of(call), self.keys.of(call), names, len(call.args), early=early)
        others = [other for other in self.programs if not other.waits]
        program.why, changing = self.misses.why(program, others), self.misses.learn(program, others)
        program.reason = self._reason_against_a_graph(program.key, call, changing)
        if not program.reason:
            self._give_graph(program, call)
        sites.settle(program)
        self._forget_waiting(self.keys.of(call))
        return program

    def _reason_against_a_graph(self, key: CallKey, call: Call, changing: str) -> str:
        """Why a kind of call goes by sites without a graph being tried; `changing` is what calls before it say, if any.

        Raises `CaptureError` where a graph was asked for.
        """
        sites = self.keys.sites
        kept, state = len(self.programs.of(key)), self.keys.tree.state(call.tree)
        reason = sites.reason_against_a_graph(key, state, kept)
        if sites.capture != "graph":
            return reason or changing
        if reason:
            name = type(call.tree.get_submodule(call.path)).__name__
            raise CaptureError(
                f'{name} is not served by a graph: {reason}. With `capture="auto"` its own Python serves such calls, '
                "with the adapters at their sites"
            )
        return ""

    def _give_graph(self, program: Program, call: Call) -> None:
        """Give a program its graph; where there can be none, its calls go by sites."""
        try:
            self.graphs.build(program, call, unroll=self.keys.sites.capture == "graph")
        except UncoveredOperatorError:
            raise
        except CaptureError as error:
            self.keys.sites.step_down(program, error)
            return
        assert program.gm is not None
        program.acts = acts_in(program.gm)
        self.keys.tree.watch_environment(call.tree, program.gm.meta[ENVIRONMENT])

    def _forget_waiting(self, key: CallKey) -> None:
        """Forget the programs that have waited for what this key is served by now."""
        for other in [other for other in self.programs if other.waits and self.keys.applied(other.key) == key]:
            self.programs.forget(other)


def title_of(call: Call) -> str:
    """What people see of a call: what is called, and with which arguments."""
    module: nn.Module = call.tree.get_submodule(call.path)
    title = describe_call(module, call.args, call.kwargs)
    return f"{call.path}({title})" if call.path else title
