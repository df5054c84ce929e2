"""Foreign tensors: what a model reads, while it is captured, that is not where its module tree has it.

A list, a closure or a module of the base may hand a model the base's own tensor. In the graph that is a read of the
tree like any other: it is known by the tensor itself, whoever was asked for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..errors import CaptureError
from ..graph.modules import CAPTURED
from ..torch_private.tensors import DisableTorchFunction, is_wrapped
from ..torch_private.tracing import FakeTensor
from ..tree.holdings import all_holdings
from ..tree.lookup import tensor_at
from ..tree.originals import other_mode
from ..tree.settings import settings_of
from .frames import running_line


class ForeignTensors(TorchFunctionMode):
    """While active, torch gets a tensor of `bare`, which is captured, in the place of the same one of `tree`.

    Raises `CaptureError` for a tensor that a graph would go on reading when the model does not: one that is held where
    nobody can watch it, that wants a gradient, or that is a part of one of the tree's.
    """

    def __init__(self, tree: nn.Module, bare: nn.Module):
        super().__init__()
        self.tree, self.bare = tree, bare
        named = (*tree.named_parameters(remove_duplicate=False), *tree.named_buffers(remove_duplicate=False))
        self._paths: dict[int, str] = {}
        for path, tensor in named:
            self._paths.setdefault(id(tensor), path)
        self._made: dict[int, Tensor] = {}  # by what the model calls, while it is captured

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with DisableTorchFunction():
            if any(self._is_foreign(leaf) for leaf in pytree.arg_tree_leaves(*args, **kwargs)):
                self._require_no_write(func, args)
                args, kwargs = pytree.tree_map_only(Tensor, self._own, (args, kwargs))
        result = func(*args, **kwargs)
        for leaf in pytree.tree_leaves(result):
            if self._is_foreign(leaf):
                self._made[id(leaf)] = leaf
        return result

    def _is_foreign(self, value: Any) -> bool:
        return isinstance(value, Tensor) and not isinstance(value, FakeTensor) and not is_wrapped(value)

    def _own(self, tensor: Tensor) -> Tensor:
        if not self._is_foreign(tensor) or id(tensor) in self._made:
            return tensor
        if path := self._paths.get(id(tensor)):
            if reason := other_mode(tensor, self.tree.get_submodule(path.rpartition(".")[0])):
                raise CaptureError(reason + running_line())
            return tensor_at(self.bare, path)
        if reason := self._reason_against(tensor):
            raise CaptureError(f"it reads a tensor of shape {list(tensor.shape)} {reason}{running_line()}")
        return tensor

    def _require_no_write(self, func: Callable[..., Any], args: Any) -> None:
        """Raise `CaptureError` if a function writes to a tensor that is not in the tree: torch would do so now."""
        target = args[0] if args else None
        if not isinstance(target, Tensor) or not self._is_foreign(target) or not writes(func):
            return
        if id(target) not in self._made and id(target) not in self._paths:
            raise CaptureError(
                f"it changes a tensor of shape {list(target.shape)} that is no buffer, which a graph would not do again"
                f"{running_line()}"
            )

    def _reason_against(self, tensor: Tensor) -> str:
        if tensor.requires_grad:
            return "that wants a gradient and is no parameter of the model"
        if tensor.untyped_storage().data_ptr() in self._storages:
            return "that is a part of one of the model's own"
        if id(tensor) not in self._watched and id(tensor) not in self._attributes:
            return "that no module holds, so that nobody would see it being replaced"
        return ""

    @functools.cached_property
    def _attributes(self) -> set[int]:
        """Tensors that modules have as plain attributes, by id: a graph reads them there."""
        return {id(value) for module in self.bare.modules() for value in vars(module).values()}

    @functools.cached_property
    def _watched(self) -> set[int]:
        """What the settings of the model hold, by id: a graph of other values is another graph."""
        places = settings_of(self.bare.named_modules())
        values = [vars(holder)[name] for _, holder, names in places for name in names]
        return {id(held) for holding in all_holdings(values) for held in holding.values()} | set(map(id, values))

    @functools.cached_property
    def _storages(self) -> set[int]:
        return _storages_of(self.tree)


def writes(func: Callable[..., Any]) -> bool:
    """Whether a torch function, by its name, writes to its first argument: `add_`, `x[i] = …`, `x.data = …`."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in ("__setitem__", "__set__") or name.startswith("__i")


def require_no_foreign(gm: GraphModule, tree: nn.Module) -> None:
    """Raise `CaptureError` if a graph captured without `ForeignTensors` has one of the tree's as a constant."""
    storages = _storages_of(tree)
    for name, constant in gm.get_submodule(CAPTURED).named_buffers():
        if constant.untyped_storage().data_ptr() in storages:
            raise CaptureError(f"it reads one of the model's own tensors by another way than its modules ({name})")


def _storages_of(tree: nn.Module) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in (*tree.parameters(), *tree.buffers())} - {0}
