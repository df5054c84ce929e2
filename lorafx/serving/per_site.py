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
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..adapters.by_row import ROWS
from ..adapters.tying import parted
from ..capture.contexts import plain_operators
from ..capture.export import trace_operator
from ..capture.frames import running_line
from ..errors import AdapterError, CaptureError, UncoveredOperatorError
from ..graph.description import argument_key, parameter_key
from ..ops.modes import modes
from ..torch_private.tensors import (
    DisableTorchFunctionSubclass,
    WithoutMode,
    backward_pass,
    function_modes,
    is_innermost_mode,
    is_torch_function_enabled,
    is_within_transform,
    put_function_mode,
    take_function_mode,
)
from ..tree.hooks import RUNNING
from ..tree.lookup import module_at
from ..tree.memory import storage_of, whole_storage_of
from ..tree.mirror import OWN, STATE
from ..tree.originals import other_mode
from ..tree.watched import PLAIN_TENSORS, can_be_watched, watched
from .call_key import Call, OperatorKey
from .concerned import Concerned
from .direct import Direct
from .methods import is_getter, is_method, takes_numbers
from .own_backward import OwnBackward
from .site_table import OwnRead, Place, SiteTable
from .tree_state import TreeState
from .turned import Turned
from .values import Values, is_worth

Run = Callable[..., Any]


class SiteInterpreter(TorchFunctionMode):
    """While active, torch functions that read what the adapters act on do what the adapters say.

    `direct` runs those that it knows at once, if there is one. For others, `run_operator(key, inputs, capture, hooked)`
    runs the graph that is kept for a key; where there is none, `capture()` gives one to rewrite, and the adapters that
    concern it. `hooked` are modules of these to be called. `step_into(self, part, module, args, kwargs)` is what a
    part does that the model calls; `ran` is told the paths of those that run. `is_new` says that the call is one of the
    first of its kind: then each function is looked at, and else only those that are given a tensor of the table's.
    `starts_anew` says that whoever calls starts anew on `RunAgain`.
    """

    def __init__(
        self,
        call: Call,
        state: TreeState,
        table: SiteTable,
        run_operator: Run,
        step_into: Run,
        direct: Direct | None = None,
        ran: set[str] | None = None,
        is_new: bool = True,
        starts_anew: bool = False,
    ):
        super().__init__()
        self.tree, self.context, self.state, self.rows = call.tree, call.context, state, call.kwargs.get(ROWS)
        self.table, self.run_operator, self.step_into, self.direct = table, run_operator, step_into, direct
        self.parts, self.is_new, self.ran = [call.path], is_new, set() if ran is None else ran
        # What somebody's hooks have begun, or those that shard parameters, an exception would leave half done.
        self.starts_anew = starts_anew and not (state.hooked or state.sharded)
        self.acted = False  # whether a site was read
        self.own_backward = OwnBackward() if is_new and torch.is_grad_enabled() else None
        self._find_tensors()

    def from_here(self) -> Callable[[], SiteInterpreter]:
        """What makes an interpreter that goes on as this one would from here: for what runs again in backward."""
        part = self.parts[-1]

        def made() -> SiteInterpreter:
            other = copy.copy(self)
            other.parts, other.is_new = [part], False
            other._find_tensors()
            return other

        return made

    def _find_tensors(self) -> None:
        table = self.table
        # Kept alive: where a hook puts others in their place, those that come later must not get their ids.
        self.kept = [place.tensor for place in (*table.weights, *table.replaced)]
        if len(set(map(id, self.kept[: len(table.weights)]))) < len(table.weights):
            self.direct = None  # adapters know a tied weight by several names: graphs see all
        self.values, self.turned = Values(self.direct), Turned()
        self.watch = contextlib.ExitStack()
        self.sees_all = self.is_new or self.direct is None or is_within_transform() or not can_be_watched(self.kept)
        self.sees_all = self.sees_all or bool(table.hidden)
        self.weights = {id(place.tensor): place.path for place in table.weights}
        self.replaced = {id(place.tensor): place.path for place in table.replaced}

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
                    self.watch.enter_context(watched(self.kept))
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
        """Run a module's forward, and see which tensors it has meanwhile: FSDP and offloading put theirs in place.

        These are gone afterwards, and another tensor may have their ids.
        """
        self.parts.append(part)
        if part not in self.table.owned:
            try:
                return forward(*args, **kwargs)
            finally:
                self._leave()
        there: list[tuple[dict[int, str], int]] = []
        for known, places in zip((self.weights, self.replaced), self.table.owned[part]):
            for place in places:
                if (number := id(place.tensor)) not in known:
                    known[number] = place.path
                    there.append((known, number))
        if there:
            self.see_all()
        try:
            return forward(*args, **kwargs)
        finally:
            for known, number in there:
                del known[number]
            self._leave()

    def _leave(self) -> None:
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
        copy_of = self._copy_of if self.replaced else None
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
        """By path, the modules whose forward an equation takes the place of: none where somebody watches, or a copy is
        for one of several modules."""
        if self.direct is None or self.state.hooked_adapters or (self.replaced and self.shared):
            return {}
        return self.table.own_reads

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
            self._require_no_values(func, args[0])
            first = self._copy_of(args[0])
            result = func(first, *args[1:], **kwargs)
            if result is first:
                return args[0]
            if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result)):
                return result
        self.acted = True
        if self.own_backward is not None:
            self.own_backward.require_none(self.parts[-1])
        return self._directly(func, args, kwargs) if self.direct else NotImplemented

    def acts_on(self, values: Iterable[Any], func: Callable[..., Any] | None = None) -> bool:
        """Whether an adapted tensor, or one that an adapter has a copy of, is among a function's arguments.

        Raises `UncoveredOperatorError` for a tensor that is part of an adapted weight, made of it before the call;
        to read its shape is no harm.
        """
        weights, replaced, memory = self.weights, self.replaced, self.memory
        for value in values:
            number, kind = id(value), type(value)
            if number in weights or number in replaced:
                return True
            if (kind is tuple or kind is list) and self.acts_on(value, func):
                return True
            if memory and kind is Tensor and (place := memory.get(storage_of(value))) and not is_getter(func):
                if storage_of(place.tensor) != storage_of(value):  # a hook has given the weight other memory since
                    continue
                raise UncoveredOperatorError(
                    f"the weight {place.path} is read by a tensor that shares its memory, which no adapter acts on"
                    f"{running_line()}"
                )
        return False

    def _require_no_values(self, func: Callable[..., Any], tensor: Tensor) -> None:
        """Raise `UncoveredOperatorError` if a method takes the numbers of an adapted weight out of torch."""
        if takes_numbers(func) and id(tensor) in self.weights:
            read = f"the weight {self.weights[id(tensor)]} is read by `{func.__name__}`, where no adapter can act"
            raise UncoveredOperatorError(read + running_line())

    def _directly(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the function gives by the equations themselves; NotImplemented where they cannot be run so."""
        values = (*args, *kwargs.values()) if kwargs else args
        read = [value for value in values if id(value) in self.weights]
        if (self.replaced and self.shared) or self.state.hooked_adapters:
            return NotImplemented
        inside = any(type(value) in (list, tuple) and self.acts_on(value) for value in values)
        if not read and not inside:
            return func(*map(self._copy_of, args), **{name: self._copy_of(value) for name, value in kwargs.items()})
        self._require_one_mode(pytree.tree_leaves((args, kwargs)) if inside else read)
        assert self.direct is not None
        if len(read) == 1 and not inside and not is_worth(func, args):
            result = self._read_directly(func, args, kwargs, read[0])
            if result is not NotImplemented:
                return result
        return self.values.given_to(func, args, kwargs, self.weights, self.parts, self._copy_of)

    def _read_directly(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], read: Any) -> Any:
        """What a function gives that reads one weight once; NotImplemented where the equations cannot be run so."""
        assert self.direct is not None
        copy_of, path, weight = self._copy_of if self.replaced else None, self.weights[id(read)], read
        if id(read) in self.turned.kept:
            linear = self.turned.as_linear(func, args, kwargs, read)
            if linear is None:
                raise UncoveredOperatorError(f"{path} is turned round, and read by {func.__name__}{running_line()}")
            func, args, kwargs, weight = F.linear, linear, {}, linear[1]
        elif read is args[0] and not self.table.is_named(path):
            made = self.turned.made(func, args, kwargs)
            if made is not NotImplemented:
                self.weights[id(made)] = path
                self.see_all()
                return made
        return self.direct.run(func, args, kwargs, path, self.parts[-1], copy_of, weight)

    def _is_known(self, func: Callable[..., Any], weight: Any) -> bool:
        """Whether equations are known for a function of a weight."""
        path = self.weights.get(id(weight))
        return path is not None and self.direct is not None and self.direct.knows(func, path)

    @functools.cached_property
    def shared(self) -> bool:
        """Whether a base tensor that an adapter has a copy of is in several modules, and not all read one copy."""
        return bool(parted(self.tree, {base: copy.path for base, copy in self.table.copies.items()}))

    def _require_one_mode(self, leaves: Iterable[Any]) -> None:
        """Raise `AdapterError` if the base's own module reads a weight, in another mode than the adapted model's."""
        for leaf in leaves:
            owner = self.weights.get(id(leaf), self.parts[-1] + ".").rpartition(".")[0]
            if owner != self.parts[-1] and (reason := other_mode(leaf, self.tree.get_submodule(owner))):
                raise AdapterError(reason)

    def _copy_of(self, value: Any) -> Any:
        """The adapters' own copy of a base tensor that they replace, in its dtype; any other value itself."""
        path = self.replaced.get(id(value))
        if path is None:
            return value
        copy = self.table.copies[path].tensor
        return copy if copy.dtype == value.dtype else copy.to(value.dtype)

    @functools.cached_property
    def memory(self) -> dict[int, Place]:
        """The weights' places by where their memory begins; none in calls of a kind that came before."""
        if not self.is_new:
            return {}
        changed = [place for place in self.table.weights if self.table.around(place.path)]  # others are what they are
        return {storage: place for place in changed if (storage := whole_storage_of(place.tensor))}

    def through_a_graph(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.context.numbers:
            name, place = getattr(func, "__name__", func), running_line()
            if hooked := self.state.hooked_adapters:
                raise AdapterError(
                    f"hooks on {', '.join(hooked)} cannot run in a call whose rows have adapters of their own: no "
                    "module of an adapter is called there. Remove them, or give each adapter's rows a call of their own"
                )
            raise UncoveredOperatorError(
                f"{self.parts[-1] or 'the model'}: {name} reads an adapted weight, and only a graph of the call "
                f"can tell there which rows have which adapter{place}"
            )
        leaves, spec = pytree.tree_flatten((args, kwargs))
        self._require_one_mode(leaves)
        paths = self._paths(leaves)
        # A hook may have cast a weight since the layout was looked at.
        keys = tuple((path, *parameter_key(x)) if path else argument_key(x) for path, x in zip(paths, leaves))
        concerned = Concerned.by(leaves, self.tree, self.context, self.parts[-1])
        hooked = concerned.hooked(self.state.hooked_adapters) if self.state.hooked_adapters else ()
        acting = tuple(adapter.call_key for adapter in self.context.adapters)
        how = func, spec, keys, modes()
        key = OperatorKey(self.parts[-1], how, self.state.layout, acting, self.context.merged, hooked)
        inputs = [leaf for leaf, path in zip(leaves, paths) if path is None and isinstance(leaf, Tensor)]

        def capture() -> Any:
            context = concerned.restricted()
            weights = (self.weights[id(leaf)] for leaf in leaves if id(leaf) in self.weights)
            owners = {path.rpartition(".")[0] for path in (*filter(None, paths), *weights)}
            owners.update(*(adapter.owners for adapter in context.adapters))
            try:
                return trace_operator(self.tree, self.parts[-1], func, leaves, spec, paths, owners), context
            except CaptureError:
                with self.suspended():
                    func(*args, **kwargs)  # a call that is wrong fails here, in the model's own words
                raise

        return self.run_operator(key, inputs, capture, hooked)

    def _paths(self, leaves: list[Any]) -> list[str | None]:
        """Where in the tree the tensors among a call's leaves are: adapted ones, and the running module's own."""
        part = self.parts[-1]
        module = module_at(self.tree, part)
        tensors = (*module._parameters.items(), *module._buffers.items())
        own = {id(tensor): f"{part}.{name}".lstrip(".") for name, tensor in tensors if tensor is not None}
        return [own.get(id(x)) or self.weights.get(id(x)) or self.replaced.get(id(x)) for x in leaves]
