"""Methods: whether a torch function is a method of tensors, reads an attribute, or takes numbers out of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

# They give what is in a tensor as something else than a tensor.
_VALUES = frozenset(
    ("tolist", "item", "numpy", "equal", "allclose", "is_nonzero", "__array__", "__dlpack__", "__contains__")
    + ("__bool__", "__int__", "__index__", "__float__", "__complex__")
)


def is_method(func: Callable[..., Any]) -> bool:
    """Whether it is a method of tensors, or reads an attribute of one."""
    return is_getter(func) or getattr(Tensor, getattr(func, "__name__", ""), None) is func


def is_getter(func: Callable[..., Any] | None) -> bool:
    """Whether it reads an attribute, as a shape."""
    return getattr(func, "__name__", "") == "__get__"


def is_setter(func: Callable[..., Any]) -> bool:
    """Whether it sets an attribute of a tensor."""
    return getattr(func, "__name__", "") == "__set__"


def reads_memory(func: Callable[..., Any]) -> bool:
    """Whether it gives a tensor's memory as another tensor, which autograd does not know to be the same."""
    return func == Tensor.data.__get__  # type: ignore[attr-defined]


def takes_numbers(func: Callable[..., Any]) -> bool:
    """Whether it is a method that takes the numbers in a tensor out of torch."""
    return getattr(func, "__name__", "") in _VALUES
