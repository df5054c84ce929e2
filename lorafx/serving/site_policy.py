"""Site policy: which calls are served by the model's own Python, site by site, rather than by one graph, and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ..capture.purity import Changed
from ..errors import CaptureError, UncoveredOperatorError, warn
from ..pipeline import Context
from ..torch_private.tensors import backward_pass
from ..tree.lookup import module_at
from ..tree.mirror import own_forward
from .adapter_hooks import call_with_hooks, hooked_copy
from .before import RunAgain, Touched
from .call_key import CallKey
from .per_site import SiteInterpreter
from .programs import Program
from .settling import Settling
from .tree_state import TreeState

SIZES = 4  # a kind of call whose graphs fit one size each, as those of an unrolled loop do, gets no more than these
Serve = Callable[[nn.Module, Context, str, tuple[Any, ...], dict[str, Any]], Any]


class SitePolicy:
    """What goes by sites in one adapted model. `capture` is the dispatcher's."""

    def __init__(self, capture: str) -> None:
        self.capture = capture
        self._settling = Settling()
        self._calls: set[CallKey] = set()  # kinds of call that go by sites, whatever the model's attributes are
        self._interpreted: defaultdict[int, set[str]] = defaultdict(set)  # by layout, modules that ran by sites
        self._early: set[str] = set()  # paths of modules that ran by sites within calls that have no graph yet
        self._graphs: set[str] = set()  # paths of modules that are graphs of their own within calls by sites
        self._warned = False

    # --- calls -------------------------------------------------------------------------------------------------------

    def applied(self, key: CallKey) -> CallKey:
        """The key; without the model's attributes for a call by sites, where the model's own Python reads them."""
        return any_key if self._calls and (any_key := key.with_any_attributes()) in self._calls else key

    def reason_against_a_graph(self, key: CallKey, state: TreeState, kept: int) -> str:
        """Why a new kind of call goes by sites without a graph being tried; empty if it may be a graph.

        `kept` is how many graphs for other sizes there are.
        """
        if self.capture == "sites" and key.part not in self._graphs:
            return "asked for by capture='sites'"
        if hooked := state.hooked_within(key.part):
            more = f" and {len(hooked) - 1} more" if len(hooked) > 1 else ""
            return f"somebody's hooks on {hooked[0] or 'all modules'}{more} expect to be called"
        if state.sharded:
            return "its parameters are sharded, and whole only while a module's own forward runs"
        if key.part in self._interpreted[key.layout] and key.part not in self._graphs:
            return "it is part of a call that is served by sites"
        many = kept >= SIZES and self.capture != "graph"
        return f"its graphs fit few sizes: {SIZES} were captured and none fits this call" if many else ""

    def ran(self, layout: int, early: bool) -> set[str]:
        """Where to note the paths of the modules that run by sites, `early` in a call that has no graph yet."""
        return self._early if early else self._interpreted[layout]

    def is_recomputed(self, path: str) -> bool:
        """Whether a module is called in backward that has run by sites: gradient checkpointing calls it again.

        It must find the same operators, whatever serves such calls by now.
        """
        return path in self._early and path not in self._graphs and backward_pass() >= 0

    def step_down(self, program: Program, error: CaptureError) -> None:
        """Serve a program's calls by sites after its graph failed with `error`, which is raised for capture='graph'."""
        if self.capture == "graph":
            raise error
        program.gm, program.reason, program.failed = None, str(error), True
        program.changes_model = isinstance(error.__cause__, Changed)

    def is_a_graph(self, path: str) -> bool:
        """Whether the module at a path is a graph of its own within calls by sites."""
        return path in self._graphs

    def settle(self, program: Program) -> None:
        """Remember that calls like a program's go by sites, unless a graph is worth another try."""
        if program.gm is None and not self._settling.may_be_done(program):
            self._calls.add(program.key.with_any_attributes())

    def forget(self, program: Program) -> None:
        """Forget that calls like a program's go by sites."""
        self._calls.discard(program.key.with_any_attributes())

    def forget_adapter(self, adapter: str) -> None:
        """Forget which calls go by sites in which an adapter acted, which is deleted."""
        self._calls = {key for key in tuple(self._calls) if not key.has(adapter)}

    def warn_once(self, program: Program) -> None:
        """Say once that a graph was tried in vain."""
        if program.failed and not self._warned:
            self._warned = True
            warn(
                f"{program.reason}\nThe model's own Python runs instead, with a graph for each site: same results, "
                "less fusion. `explain()` lists such calls; capture='graph' makes them an error."
            )

    # --- parts of a call that goes by sites --------------------------------------------------------------------------

    def step_into(
        self,
        interpreter: SiteInterpreter,
        path: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        serve: Serve,
    ) -> Any:
        """Run the own Python of a part that the running model calls.

        Where that reads an adapted tensor in an odd way, the part is served as a call by itself, by a graph.
        """
        interpreter.ran.add(path)
        if path not in self._graphs:
            # The first part of all that needs a graph has the call start anew; from then on parts take note.
            takes_note = interpreter.is_new and (self._graphs or not interpreter.starts_anew)
            touched = Touched.of(module, args, kwargs) if takes_note else None
            try:
                forward = own_forward(module)
                if hooked := interpreter.state.hooked_adapters:
                    forward = self._with_hooks(interpreter, path, forward, hooked)
                return interpreter.run_inside(path, forward, args, kwargs)
            except UncoveredOperatorError as error:
                inside = self._early.union(*tuple(self._interpreted.values()))
                if interpreter.rows is not None or any(other.startswith(f"{path}.") for other in inside):
                    raise
                self._graphs.add(path)
                if touched is not None:
                    touched.put_back(error)
                elif interpreter.is_new:
                    raise RunAgain(str(error)) from error
        if interpreter.rows is not None:
            raise UncoveredOperatorError(f"{path} is a graph of its own, which cannot tell which rows it is given")
        interpreter.acted = True  # whether its graph does is seen when that is made
        interpreter.see_all()
        with interpreter.suspended():
            return serve(interpreter.tree, interpreter.context, path, args, kwargs)

    def _with_hooks(
        self, interpreter: SiteInterpreter, path: str, forward: Callable[..., Any], hooked: tuple[str, ...]
    ) -> Callable[..., Any]:
        """A part's forward with the hooks of the adapters' own copy of the part, if somebody hooks that."""
        copy = hooked_copy(interpreter.context.adapters, hooked, path)
        return partial(call_with_hooks, module_at(interpreter.tree, copy), forward) if copy else forward
