"""Loops over a size in a model's own Python, as a scan's or over chunks: a graph repeats them, and fits one size alone.

A capture finds such a loop where the loop begins, and that may be thousands of operators after the module's first. So
what looped is remembered, and the next capture, of another kind of call, is refused where it comes to the same module.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CaptureError
from ..torch_private.replacing import range_replaced
from .frames import running_line, running_module

# By the name or the number of an argument that is a tensor, its sizes, None for a symbol.
Sizes = dict[int | str, tuple[int | None, ...]]


class Looping(CaptureError):
    """A call loops over a size."""


class Loops:
    """Which modules of a tree have looped over a size, each with the sizes that it was given."""

    def __init__(self) -> None:
        self._found: dict[str, list[tuple[Sizes, str]]] = {}

    def remember(self, root: nn.Module) -> None:
        """Have modules below `root`, a mirror of the tree, raise `Looping` where they would loop again."""
        paths = {path: module for path, module in root.named_modules() if path in self._found}
        for path, module in paths.items():
            forward = module.forward
            module.__dict__["forward"] = functools.wraps(forward)(functools.partial(self._call, path, forward))

    def _call(self, path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = _sizes(args, kwargs).items()
        for sizes, message in self._found[path]:
            if sizes.items() <= given:  # with more arguments it does more, and hardly less
                raise Looping(message)
        return forward(*args, **kwargs)

    @contextlib.contextmanager
    def refused(self, root: nn.Module, part: nn.Module) -> Iterator[None]:
        """Raise `Looping` where the own code of `part`, in a mirror `root` of the tree, loops over a symbolic size."""
        paths = {id(vars(module)): path for path, module in root.named_modules()}  # torch's stand-ins share these
        with range_replaced(part, functools.partial(self._range, paths)):
            yield

    def _range(self, paths: dict[int, str], *bounds: Any) -> range:
        """Stands in for `range`, which would make of a symbolic size the number that it is in this call."""
        if not any(map(_is_symbol, bounds)):
            return range(*bounds)
        message = (
            "it loops over a size: a graph would repeat the loop's operators as often as this call does, and fit no "
            f"other{running_line()}"
        )
        module, args, kwargs = running_module()
        if (path := paths.get(id(vars(module)) if module is not None else 0)) is not None:
            self._found.setdefault(path, []).append((_sizes(args, kwargs), message))
        raise Looping(message)


def _sizes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sizes:
    given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    return {name: tuple(map(_size, x.shape)) for name, x in given.items() if isinstance(x, Tensor)}


def _size(size: Any) -> int | None:
    return None if _is_symbol(size) else int(size)


def _is_symbol(size: Any) -> bool:
    return isinstance(size, torch.SymInt) and not size.node.is_constant()
