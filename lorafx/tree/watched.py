"""Watched tensors: a thread that runs a model's own Python is told of each torch function that is given one of some.

A torch function mode would be told of all functions, which costs about as much as the functions of a small model. So
the class of just these tensors is another one for that time, whose `__torch_function__` asks `RUNNING.mode`, unless
that sees all functions; whatever road a model has to such a tensor, it is the same object. In other threads, and for
everybody who asks what it is, it is the tensor that it was.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ..torch_private.tensors import DisableTorchFunctionSubclass, is_wrapped
from .hooks import RUNNING


def _told(cls: type, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
    if (mode := RUNNING.mode) is not None:
        return mode.told(func, types, args, kwargs or {})
    with DisableTorchFunctionSubclass():
        return func(*args, **(kwargs or {}))


class WatchedParameter(nn.Parameter):
    """A parameter while somebody watches it; who makes another one of its class, as a copy, gets a plain one."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return nn.Parameter(*args, **kwargs)

    __torch_function__: Any = classmethod(_told)


class WatchedTensor(Tensor):
    """A plain tensor while somebody watches it; copies and files of it are plain."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return Tensor(*args, **kwargs)

    __torch_function__: Any = classmethod(_told)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._plain(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._plain().__reduce_ex__(protocol)

    def _plain(self) -> Tensor:
        plain = self.detach().requires_grad_(self.requires_grad)
        vars(plain).update(vars(self))
        return plain


_WATCHED: dict[type, type] = {nn.Parameter: WatchedParameter, Tensor: WatchedTensor}
_PLAIN = {watched: plain for plain, watched in _WATCHED.items()}
PLAIN_TENSORS = frozenset({*_WATCHED, *_PLAIN})  # the classes of ordinary tensors, watched or not

_LOCK = threading.Lock()
_WATCHERS: Counter[int] = Counter()  # how many threads watch a tensor, by its id


def can_be_watched(tensors: Sequence[Tensor]) -> bool:
    """Whether these are ordinary tensors, all of them, and no stand-ins of a transform."""
    return all(type(each) in PLAIN_TENSORS and not is_wrapped(each) for each in tensors)


@contextlib.contextmanager
def watched(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Have `RUNNING.mode` told of torch functions that get one of the tensors, by `told(func, types, args, kwargs)`.

    It is not told where another class answers first, or while somebody has switched off what classes say.
    """
    with _LOCK:
        for each in tensors:
            _WATCHERS[id(each)] += 1
            each.__class__ = _WATCHED.get(type(each), type(each))  # type: ignore[assignment]
    try:
        yield
    finally:
        with _LOCK:
            for each in tensors:
                _WATCHERS[id(each)] -= 1
                if not _WATCHERS[id(each)]:
                    del _WATCHERS[id(each)]
                    each.__class__ = _PLAIN.get(type(each), type(each))  # type: ignore[assignment]
