"""Layout: what captured graphs are specialised on in a module tree, besides the call itself.

That is its modules, the mode each is in, each tensor's dtype and device, hooks, and the Python values that modules
hold. Every call asks for it, so the walk over the modules is remembered, and each call only checks that nothing has
changed since.
"""

from __future__ import annotations

import sys
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..torch_private.tensors import call_hooks, global_call_hooks
from ..tree.attached import own_children, own_modules
from .attribute_guards import Watch

# Hooks of these libraries are part of how a model computes; anybody else's expect to be called each time.
_LIBRARIES = ("torch.", "transformers.", "accelerate.")
_dtype_of, _device_of = Tensor.dtype.__get__, Tensor.device.__get__  # type: ignore[attr-defined]
ANY = -1  # for a call whose graph, or lack of one, does not depend on attributes


class Seen(NamedTuple):
    """The state of a tree by two numbers: what operators depend on, and the values that the model's Python reads."""

    layout: int
    attributes: int


class Layout:
    """Numbers the states that a tree is seen in; equal numbers mean that the same graphs fit."""

    def __init__(self) -> None:
        self.watch = Watch()
        self.hooked = False  # whether somebody watches inner modules run, by hooks of his own
        self.sharded = False  # whether some tensors are whole only while a module's own forward runs
        self.generation = 0  # how often modules have come or gone
        self._modules: list[nn.Module] = []
        self._children: list[dict[str, Any]] = []
        self._owned: list[Any] = []
        self._tensors: list[Tensor] = []
        self._last: tuple[Any, ...] = ()
        self._number = -1
        self._seen: dict[tuple[Any, ...], int] = {}
        self._next_hook = -1
        self._hooks: tuple[Any, ...] = ()

    def number(self, root: nn.Module) -> Seen:
        """The numbers of the state that the tree is in now."""
        if not self._children or self._parents != self._children:
            self._walk(root)
        attributes = self.watch.number()
        if attributes is None:
            self._look(root)
            attributes = self.watch.number()
            assert attributes is not None
        self._look_for_hooks()
        owned = list(chain.from_iterable(map(dict.values, self._owners)))
        if len(owned) != len(self._owned) or not all(map(is_, owned, self._owned)):
            self._owned, self._tensors, self._number = owned, [t for t in owned if t is not None], -1
            self.sharded = any(map(_is_sharded, self._tensors))
        now = list(map(_dtype_of, self._tensors)), list(map(_device_of, self._tensors)), self.watch.modes
        if now != self._last or self._number < 0:
            self._last = now
            shapes = tuple(tensor.shape for tensor in self._tensors)
            key = (self.generation, self._hooks, shapes, *map(tuple, now))
            self._number = self._seen.setdefault(key, len(self._seen))
        return Seen(self._number, attributes)

    def _walk(self, root: nn.Module) -> None:
        modules = list(own_modules(root))
        if modules != self._modules:
            self.generation += 1
        self._modules, self._number = modules, -1
        self._parents = [root._modules, *(module._modules for module in modules[1:] if own_children(module))]
        self._children = [children.copy() for children in self._parents]
        self._owners: list[dict[str, Any]] = [d for m in modules for d in (m._parameters, m._buffers) if d]
        # The root's own hooks are run by whoever calls it.
        self._hook_dicts = [hooks for m in modules[1:] for hooks in call_hooks(m)]
        self._hook_dicts += global_call_hooks()
        self._next_hook = -1
        self._look(root)

    def _look(self, root: nn.Module) -> None:
        own = set(map(id, self._modules))
        self.watch.look_at(root, ((path, m) for path, m in root.named_modules() if id(m) in own))

    def _look_for_hooks(self) -> None:
        if RemovableHandle.next_id == self._next_hook and not self._hooks:  # none was registered, anywhere
            return
        self._next_hook = RemovableHandle.next_id
        hooks = tuple(hook for hooks in self._hook_dicts for hook in hooks.values())
        if hooks != self._hooks:
            self._hooks, self._number = hooks, -1
            self.hooked = any(not str(getattr(hook, "__module__", "")).startswith(_LIBRARIES) for hook in hooks)


def _is_sharded(tensor: Tensor) -> bool:
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)
