"""Per site: where there is no graph of a call, the model's own Python runs, and adapters act at each site by itself.

A torch function that gets an adapted tensor is computed in the adapters' equations, right there (`direct`). One that no
reading knows is captured, rewritten by the same pipeline and kept, like a call of the whole model. Every other function
runs as it is. So an adapter acts wherever its weight is read, in whatever module, and a read that no reading covers is
an error here as it is in a graph of the whole.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..adapters.by_row import ROWS
from ..capture.contexts import plain_operators
from ..capture.frames import running_line
from ..errors import AdapterError, CaptureError, UncoveredOperatorError
from ..torch_private.tensors import (
    DisableTorchFunctionSubclass,
    WithoutMode,
    backward_pass,
    function_modes,
    is_innermost_mode,
    is_torch_function_enabled,
    put_function_mode,
    take_function_mode,
)
from ..tree.hooks import RUNNING
from ..tree.mirror import OWN, STATE
from ..tree.watched import PLAIN_TENSORS, watched
from .adapted_tensors import AdaptedTensors
from .call_key import Call
from .direct import Direct
from .methods import is_method
from .operator_call import OperatorCall
from .own_backward import OwnBackward
from .site_table import OwnRead, SiteTable
from .tree_state import TreeState
from .turned import Turned
from .values import Values, is_worth

Run = Callable[..., Any]


class Sites(NamedTuple):
    """What is known of a tree's sites: the state of the tree, where they are, and what runs equations, if anything."""

    state: TreeState
    table: SiteTable
    direct: Direct | None = None


class Outside(NamedTuple):
    """What an interpreter has others do.

    `run_operator(key, inputs, capture, hooked)` runs the graph that is kept for a key; where there is none, `capture()`
    gives one to rewrite, and the adapters that concern it. `hooked` are modules of these to be called.
    `step_into(interpreter, part, module, args, kwargs)` is what a part does that the model calls; `ran` is told the
    paths of those that run.
    """

    run_operator: Run
    step_into: Run
    ran: set[str]


class SiteInterpreter(TorchFunctionMode):
    """While active, torch functions that read what the adapters act on do what the adapters say.

    Those that `sites.direct` knows run at once, others by graphs of their own. `is_new` says that the call is one of
    the first of its kind: then each function is looked at, and else only those that are given a tensor of the table's.
    `starts_anew` says that whoever calls starts anew on `RunAgain`.
    """

    acts_on: Callable[..., bool]  # of the tensors: each function that is looked at asks for it

    def __init__(self, call: Call, sites: Sites, outside: Outside, is_new: bool = True, starts_anew: bool = False):
        super().__init__()
        self.tree, self.context, self.rows = call.tree, call.context, call.kwargs.get(ROWS)
        self.state, self.table, self.direct = sites
        self.run_operator, self.step_into, self.ran = outside
        self.parts, self.is_new, self.looks_at_memory = [call.path], is_new, is_new
        # What somebody's hooks have begun, or those that shard parameters, an exception would leave half done.
        self.starts_anew = starts_anew and not (self.state.hooked or self.state.sharded)
        self.acted = False  # whether a site was read
        self.own_backward = OwnBackward() if is_new and torch.is_grad_enabled() else None
        self._look()

    def from_here(self) -> Callable[[], SiteInterpreter]:
        """What makes an interpreter that goes on as this one would from here: for what runs again in backward."""
        part = self.parts[-1]

        def made() -> SiteInterpreter:
            other = copy.copy(self)
            other.parts, other.is_new = [part], False
            other._look()
            return other

        return made

    def _look(self) -> None:
        """Look which tensors the adapters act on now, and how to be told of the functions that get one."""
        self.tensors = AdaptedTensors(self.tree, self.table, self.looks_at_memory)
        self.acts_on = self.tensors.acts_on
        if self.tensors.are_tied:
            self.direct = None  # graphs see all the names by which adapters know a weight
        self.values, self.turned = Values(self.direct), Turned()
        self.watch = contextlib.ExitStack()
        self.sees_all = self.is_new or self.direct is None or not self.tensors.can_be_watched

    @staticmethod
    def running(tree: nn.Module) -> SiteInterpreter | None:
        """The interpreter that runs `tree`'s own Python in this thread now, if one does."""
        mode = RUNNING.mode
        return mode if mode is not None and mode.tree is tree else None

    @contextlib.contextmanager
    def active(self) -> Iterator[SiteInterpreter]:
        """Run the tree's own Python inside."""
        outer, RUNNING.mode = RUNNING.mode, self
        self.backward = backward_pass()  # what runs in another one, which the model has begun, is none of its code
        try:
            with plain_operators(), self.watch:
                if self.own_backward is not None:
                    self.watch.enter_context(self.own_backward.seen())
                self.sees_all = self.sees_all or function_modes() > 0  # another mode, which is to be told second
                if self.sees_all:
                    self.watch.enter_context(self)
                else:
                    self.watch.enter_context(watched(self.tensors.every))
                yield self
                self.values.drop(depth=1)
        finally:
            RUNNING.mode = outer

    def see_all(self) -> None:
        """Look at each function from here on: a graph is to run, which takes tensors for what they are."""
        if not self.sees_all:
            self.sees_all = True
            self.watch.close()
            put_function_mode(self)
            self.watch.callback(take_function_mode, self)

    def run_inside(self, part: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module's forward, and see which tensors it has meanwhile: FSDP and offloading put theirs in place."""
        self.parts.append(part)
        new = self.tensors.come_with(part) if part in self.table.owned else ()
        if new:
            self.see_all()
        try:
            return forward(*args, **kwargs)
        finally:
            self.tensors.forget(new)
            depth = len(self.parts)
            self.parts.pop()
            if self.values.kept:
                self.values.drop(depth)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Run something as though the interpreter were not active: another part's graph, or a module's hooks.

        Raises `AdapterError` if that leaves the model with others acting than it had.
        """
        before = self._acting()
        RUNNING.mode = None
        try:
            yield
        finally:
            RUNNING.mode = self
        if self._acting() != before:
            raise AdapterError(
                f"a hook below {self.parts[-1] or 'the model'} changed which adapters act, or how, while a call runs, "
                "which goes on with those that it began with: change them before or after a call"
            )

    def _acting(self) -> Any:
        state = vars(self.tree).get(STATE)
        return None if state is None else state.context

    def run_site(self, part: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a module gives whose own forward is one call that reads its weight; NotImplemented for any other."""
        read = self.own_reads.get(part)
        if read is None or len(args) != 1 or kwargs or type(args[0]) is not Tensor:
            return NotImplemented
        others = not is_innermost_mode(self) if self.sees_all else function_modes() > 0
        if others or type(read.module).forward is not read.forward or OWN in vars(read.module):
            return NotImplemented
        assert self.direct is not None
        copy_of = self.tensors.copy_of if self.tensors.replaced else None
        with WithoutMode(self) if self.sees_all else DisableTorchFunctionSubclass():
            if self.acts_on(args):
                return NotImplemented
            result = self.direct.run(read.forward, (read.module, *args), kwargs, read.weight, part, copy_of)
        if result is not NotImplemented:
            self.acted = True
            self.ran.add(part)
        return result

    @functools.cached_property
    def own_reads(self) -> dict[str, OwnRead]:
        """By path, the modules whose forward an equation takes the place of: none where sites need graphs."""
        return {} if self._needs_graphs else self.table.own_reads

    @property
    def _needs_graphs(self) -> bool:
        """Whether equations alone do not do: where somebody watches, or a copy is for one of several modules."""
        return self.direct is None or bool(self.state.hooked_adapters) or self.tensors.copies_differ

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Each function that the model calls may come here, so what nearly all do is done in a few steps.
        if RUNNING.mode is not self or not self.acts_on((*args, *kwargs.values()) if kwargs else args, func):
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        if not (is_torch_function_enabled() and PLAIN_TENSORS.issuperset(types)):
            self.table.hidden.add(func)
        result = self._without_a_graph(func, args, kwargs)
        return self.through_a_graph(func, args, kwargs) if result is NotImplemented else result

    def told(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a function gives that gets a watched tensor, of this thread's or of another's."""
        if self.sees_all or backward_pass() != self.backward:  # it has been looked at, or a backward reads the base's
            with DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        result = NotImplemented
        if PLAIN_TENSORS.issuperset(types):
            with DisableTorchFunctionSubclass():
                if not self.acts_on((*args, *kwargs.values()), func):
                    return func(*args, **kwargs)
                result = self._without_a_graph(func, args, kwargs)
        if result is NotImplemented:  # a graph is needed, or another class has a say
            self.see_all()
            return func(*args, **kwargs)
        return result

    def _without_a_graph(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a function that reads an adapted tensor gives, if no graph has to be made for that; NotImplemented."""
        # Of a weight: its shape, its dtype …; of a counter: `add_`, or its value.
        is_alone = is_method(func) and not self.acts_on((*args[1:], *kwargs.values()), func)
        if is_alone and not self._is_known(func, args[0]):
            self.tensors.require_no_values(func, args[0])
            first = self.tensors.copy_of(args[0])
            result = func(first, *args[1:], **kwargs)
            if result is first:
                return args[0]
            if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result)):
                return result
        self.acted = True
        if self.own_backward is not None:
            self.own_backward.require_none(self.parts[-1])
        return self._directly(func, args, kwargs) if self.direct else NotImplemented

    def _directly(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the function gives by the equations themselves; NotImplemented where they cannot be run so."""
        if self._needs_graphs:
            return NotImplemented
        tensors, part = self.tensors, self.parts[-1]
        values = (*args, *kwargs.values()) if kwargs else args
        read = [value for value in values if id(value) in tensors.weights]
        inside = any(type(value) in (list, tuple) and self.acts_on(value) for value in values)
        if not read and not inside:
            copies = {name: tensors.copy_of(value) for name, value in kwargs.items()}
            return func(*map(tensors.copy_of, args), **copies)
        tensors.require_one_mode(pytree.tree_leaves((args, kwargs)) if inside else read, part)
        assert self.direct is not None
        if len(read) == 1 and not inside and not is_worth(func, args):
            result = self._read_directly(func, args, kwargs, read[0])
            if result is not NotImplemented:
                return result
        return self.values.given_to(func, args, kwargs, tensors.weights, self.parts, tensors.copy_of)

    def _read_directly(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], read: Any) -> Any:
        """What a function gives that reads one weight once; NotImplemented where the equations cannot be run so."""
        assert self.direct is not None
        tensors, weight = self.tensors, read
        path = tensors.weights[id(read)]
        if id(read) in self.turned.kept:
            linear = self.turned.as_linear(func, args, kwargs, read)
            if linear is None:
                return NotImplemented
            func, args, kwargs, weight = F.linear, linear, {}, linear[1]
        elif args and read is args[0] and not self.table.is_named(path):
            made = self.turned.made(func, args, kwargs)
            if made is not NotImplemented:
                tensors.weights[id(made)] = path
                self.see_all()
                return made
        copy_of = tensors.copy_of if tensors.replaced else None
        return self.direct.run(func, args, kwargs, path, self.parts[-1], copy_of, weight)

    def _is_known(self, func: Callable[..., Any], weight: Any) -> bool:
        """Whether equations are known for a function of a weight."""
        path = self.tensors.weights.get(id(weight))
        return path is not None and self.direct is not None and self.direct.knows(func, path)

    def through_a_graph(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a function gives that reads an adapted tensor, by a graph of its own."""
        if self.context.numbers:
            self._refuse_rows(func)
        call = OperatorCall.of(self.tensors, self.context, self.parts[-1], func, args, kwargs)
        if turned := [leaf for leaf in call.leaves if id(leaf) in self.turned.kept]:  # a graph would read it as it was
            path, name = self.tensors.weights[id(turned[0])], getattr(func, "__name__", func)
            raise UncoveredOperatorError(f"the weight {path} is turned round, and read by {name}{running_line()}")
        hooked = call.concerned.hooked(self.state.hooked_adapters) if self.state.hooked_adapters else ()

        def capture() -> Any:
            try:
                return call.captured()
            except CaptureError:
                with self.suspended():
                    func(*args, **kwargs)  # a call that is wrong fails here, in the model's own words
                raise

        return self.run_operator(call.key(self.state, hooked), call.inputs, capture, hooked)

    def _refuse_rows(self, func: Callable[..., Any]) -> NoReturn:
        """Raise the error that says why a graph of a function does not do where rows have adapters of their own."""
        if hooked := self.state.hooked_adapters:
            raise AdapterError(
                f"hooks on {', '.join(hooked)} cannot run in a call whose rows have adapters of their own: no module "
                "of an adapter is called there. Remove them, or give each adapter's rows a call of their own"
            )
        name, place = getattr(func, "__name__", func), running_line()
        raise UncoveredOperatorError(
            f"{self.parts[-1] or 'the model'}: {name} reads an adapted weight, and only a graph of the call can tell "
            f"there which rows have which adapter{place}"
        )
