"""Layout: what captured graphs are specialised on in a module tree, besides the call itself.

That is its modules, the mode each is in, and each tensor's dtype and device. Every call asks for it, so the walk over
the modules is remembered, and each call only checks that nothing has changed since.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .tree import own_children, own_modules

# Hooks of these libraries are part of how a model computes; anybody else's expect to be called each time.
_LIBRARIES = ("torch.", "transformers.", "accelerate.")


class Layout:
    """Numbers the states that a tree is seen in; equal numbers mean that the same graphs fit."""

    def __init__(self) -> None:
        self._modules: list[nn.Module] = []
        self._children: list[tuple[dict[str, Any], list[Any]]] = []
        self._vars: list[dict[str, Any]] = []
        self._tensors: list[dict[str, Any]] = []
        self._hooks: list[dict[int, Any]] = []
        self._generation = 0
        self._last: tuple[list[Any], ...] = ()
        self._number = -1
        self._seen: dict[tuple[Any, ...], int] = {}
        self._next_hook = -1
        self.hooked = False  # whether somebody watches inner modules run, by hooks of his own

    def number(self, root: nn.Module) -> int:
        """The number of the state that the tree is in now."""
        if not self._children or any(list(children.values()) != known for children, known in self._children):
            self._walk(root)
        if RemovableHandle.next_id != self._next_hook or self.hooked:  # a hook was registered, somewhere
            self._next_hook, self.hooked = RemovableHandle.next_id, any(map(_is_foreign, self._hooks))
        tensors = [tensor for owned in self._tensors for tensor in owned.values() if tensor is not None]
        modes = [attributes["training"] for attributes in self._vars]
        now = modes, [tensor_layout(tensor) for tensor in tensors], [self.hooked]
        if now != self._last or self._number < 0:
            self._last = now
            self._number = self._seen.setdefault((self._generation, *map(tuple, now)), len(self._seen))
        return self._number

    def _walk(self, root: nn.Module) -> None:
        modules = list(own_modules(root))
        if modules != self._modules:
            self._generation += 1
        self._modules, self._number = modules, -1
        self._children = [(root._modules, list(root._modules.values()))]
        self._children += [(m._modules, list(m._modules.values())) for m in modules if own_children(m)]
        self._vars = [vars(module) for module in modules]
        self._tensors = list(_representatives(modules))
        # The root's own hooks are run by whoever calls it.
        self._hooks = [hooks for m in modules[1:] for hooks in (m._forward_hooks, m._forward_pre_hooks)]


def _representatives(modules: list[nn.Module]) -> Iterator[dict[str, Any]]:
    """The tensors of the first and the last module of each class and each set of tensor names.

    Casts change all norms, or all but the head. Where one module alone was cast, the graph's operators promote or fail
    as the model's own would.
    """
    ends: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for module in modules:
        for owned in (module._parameters, module._buffers):
            if owned:
                ends.setdefault((type(module), *owned), []).append(owned)
    for group in ends.values():
        yield from (group[0], group[-1])


def _is_foreign(hooks: dict[int, Any]) -> bool:
    return any(not str(getattr(hook, "__module__", "")).startswith(_LIBRARIES) for hook in hooks.values())


def tensor_layout(tensor: torch.Tensor) -> tuple[torch.dtype, torch.device]:
    """What a graph is specialised on in one tensor."""
    return tensor.dtype, tensor.device
