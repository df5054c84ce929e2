"""The state of a module tree: all that captured graphs are specialised on besides the call itself.

That is the tree's modules, whether each trains, the dtype and device of each tensor, hooks, and the Python values that
modules hold. Every call asks for it. The walk over the modules is remembered, so that a call only checks that nothing
has changed since, and then gets the same snapshot as the call before.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Container, Iterator
from itertools import chain, count
from operator import is_
from types import FunctionType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..torch_private.tensors import call_hooks, global_call_hooks, is_traceable_wrapper_subclass
from ..tree.attached import attached_modules, named_own_modules, own_children, own_modules
from ..tree.holdings import Holding, noted
from ..tree.own_layers import own_forward_of
from ..tree.wrappers import is_fsdp1
from .attribute_guards import AttributeGuards, AttributeState

# Hooks of these libraries are part of how a model computes; anybody else's expect to be called each time.
_LIBRARIES = ("torch.nn.", "torch.ao.", "torch.distributed.", "transformers.", "accelerate.")
_LAYOUTS = 256  # so many layouts are remembered, the oldest making room
_dtype_of, _device_of = Tensor.dtype.__get__, Tensor.device.__get__  # type: ignore[attr-defined]


class TreeState(NamedTuple):
    """A tree as one call finds it.

    Two states of one `layout` have the same modules, training or not, tensors of the same shapes, dtypes and devices,
    and the same hooks that compute: torch's operators do the same in both. Which hooks somebody watches by is no part
    of it, only where he does, so that one that is registered anew in each step costs nothing. `attributes` are the
    values that only the model's Python reads. `modules` numbers the modules alone, whatever is in them.
    """

    layout: int
    attributes: AttributeState
    hooked: tuple[str, ...]  # paths of inner modules that somebody watches run by hooks of his own; "" for all of them
    sharded: bool  # some tensors are whole only while a module's own forward runs
    hooked_adapters: tuple[str, ...] = ()  # modules of adapters' tensors that somebody watches
    modules: int = 0

    def hooked_within(self, part: str) -> tuple[str, ...]:
        """The paths that somebody watches below the module at a path, whose own hooks are run by whoever calls it."""
        return tuple(path for path in self.hooked if not (part and path) or path.startswith(f"{part}."))


class TreeGuards:
    """Watches one tree, and numbers the layouts that it is seen in. One thread at a time looks at it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._attributes = AttributeGuards()
        self._environment: set[str] = set()
        self._walks = 0  # how often other modules were found
        self._modules: list[nn.Module] = []
        self._parents: list[dict[str, Any]] = []
        self._children: list[dict[str, Any]] = []  # what the parents had when they were walked over
        self._owned: list[Any] = []
        self._tensors: list[Tensor] = []
        self._hooks: tuple[tuple[str, Any], ...] = ()  # with the paths of their modules
        self._hooked_adapters: tuple[str, ...] = ()
        self._next_hook = -1
        self._layouts: OrderedDict[tuple[Any, ...], int] = OrderedDict()
        self._numbers = count()
        self._last: tuple[Any, ...] = ()
        self._state: TreeState | None = None  # None when something has changed that the layout depends on

    @property
    def modules(self) -> list[nn.Module]:
        """The tree's own modules, as they were found last."""
        return self._modules

    def watch_environment(self, root: nn.Module, names: Collection[str]) -> None:
        """Count these environment variables among the values that only the model's Python reads, from now on."""
        with self._lock:
            if not self._environment.issuperset(names):
                self._environment.update(names)
                self._watch_attributes(root)

    def latest(self, root: nn.Module) -> TreeState:
        """The state that the tree was found in last, for who has just asked: to look takes a while."""
        return self._state or self.state(root)

    def state(self, root: nn.Module) -> TreeState:
        """The state that the tree is in now; the same object as long as nothing changes."""
        with self._lock:
            return self._look(root)

    def _look(self, root: nn.Module) -> TreeState:
        if not self._children or self._parents != self._children:
            self._walk(root)
        attributes, training = self._attributes.state() or self._watch_attributes(root)
        self._look_for_hooks(root)
        owned = list(chain.from_iterable(map(dict.values, self._owners)))
        if len(owned) != len(self._owned) or not all(map(is_, owned, self._owned)):
            self._owned, self._tensors, self._state = owned, [t for t in owned if t is not None], None
        now = list(map(_dtype_of, self._tensors)), list(map(_device_of, self._tensors)), training
        if self._state is None or now != self._last:
            self._last = now
            sharded = any(map(_is_sharded, self._tensors)) or any(map(is_fsdp1, self._modules))
            layout, hooked = self._layout(*now), self._hooked()
            self._state = TreeState(layout, attributes, hooked, sharded, self._hooked_adapters, self._walks)
        elif self._state.attributes is not attributes:
            self._state = self._state._replace(attributes=attributes)
        return self._state

    def noted(self) -> tuple[list[Tensor], Callable[[], None]]:
        """Take note of all that the tree was found to hold last.

        Gives the buffers and other tensors that a call may write to, and what puts everything else back: attributes,
        what they hold at any depth, and which buffers are where.
        """
        with self._lock:
            tensors = [each for each in self._tensors if not isinstance(each, nn.Parameter)]
            tensors += self._attributes.held_tensors()
            put_back_buffers = noted(Holding(dict.values, module._buffers) for module in self._modules)
            put_back_attributes = self._attributes.noted()

        def put_back() -> None:
            put_back_buffers()
            put_back_attributes()

        return tensors, put_back

    def _layout(self, *now: Any) -> int:
        # The class counts of those that know themselves what operators do to them, as packed weights.
        shapes = tuple((t.shape, type(t) if is_traceable_wrapper_subclass(t) else None) for t in self._tensors)
        computing = tuple(_key_of_hook(hook) for _, hook in self._hooks if _computes(hook))
        key = (self._walks, computing, self._hooked(), shapes, *map(tuple, now))
        if key not in self._layouts:
            self._layouts[key] = next(self._numbers)
            if len(self._layouts) > _LAYOUTS:
                self._layouts.popitem(last=False)
        return self._layouts[key]

    def _hooked(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(path for path, hook in self._hooks if not _computes(hook)))

    def _walk(self, root: nn.Module) -> None:
        modules = list(own_modules(root))
        if modules != self._modules:
            self._walks += 1
        self._modules, self._state = modules, None
        self._parents = [root._modules, *(module._modules for module in modules[1:] if own_children(module))]
        self._children = [children.copy() for children in self._parents]
        self._owners: list[dict[str, Any]] = [d for m in modules for d in (m._parameters, m._buffers) if d]
        # The root's own hooks are run by whoever calls it.
        self._hook_dicts = [(module, hooks) for module in modules[1:] for hooks in call_hooks(module)]
        self._next_hook = -1
        self._watch_attributes(root)

    def _watch_attributes(self, root: nn.Module) -> tuple[AttributeState, tuple[bool, ...]]:
        watched = ((path, module) for path, module in named_own_modules(root) if own_forward_of(module) is None)
        self._attributes.watch(root, watched, sorted(self._environment))
        state = self._attributes.state()
        assert state is not None, "what was just looked at is there"
        return state

    def _look_for_hooks(self, root: nn.Module) -> None:
        if RemovableHandle.next_id == self._next_hook and not self._hooks:  # none was registered, anywhere
            return
        self._next_hook = RemovableHandle.next_id
        attached = (m for m in attached_modules(self._modules) if m._parameters and any(call_hooks(m)))
        hooks = list(_hooks_of(root, {id(module) for module in attached}, every_path=False))
        self._hooked_adapters = tuple(dict.fromkeys(path for path, _ in hooks))
        every = [("", hook) for found in global_call_hooks() for hook in found.values()]
        every += _hooks_of(root, {id(module) for module, hooks in self._hook_dicts if hooks}, every_path=True)
        if (found := (*every, *hooks)) != self._hooks:
            self._hooks, self._state = found, None


def _hooks_of(root: nn.Module, hooked: Container[int], every_path: bool) -> Iterator[tuple[str, Any]]:
    """The hooks of those modules whose `id` is in `hooked`, by the first path of each, or by every one."""
    if hooked:
        for path, module in root.named_modules(remove_duplicate=not every_path):
            if id(module) in hooked:
                yield from ((path, hook) for hooks in call_hooks(module) for hook in hooks.values())


def _computes(hook: Any) -> bool:
    """Whether a hook is part of how the model computes."""
    return str(getattr(hook, "__module__", "")).startswith(_LIBRARIES)


def _key_of_hook(hook: Any) -> Any:
    """A hook itself; its code if that is all there is to it, for a trainer may make and register it in each step."""
    alone = isinstance(hook, FunctionType) and not (hook.__closure__ or hook.__defaults__ or hook.__kwdefaults__)
    return (hook.__module__, hook.__code__) if alone else hook


def _is_sharded(tensor: Tensor) -> bool:
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)
