"""What a model asks of autograd, or tells it, while it runs: a graph has the operators of forward and none of that.

The model is captured without adapters, so nothing that it computes wants a gradient then, as it does later. A branch on
that would be taken wrongly, and a tensor's hook or a function's own backward would be lost without a word.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import CaptureError
from ..torch_private.replacing import function_applications_seen
from .frames import is_asked_by_torch, is_torchs_own, running_line


def _getter(name: str) -> Any:
    """What torch function modes are given where somebody reads this attribute of a tensor."""
    return getattr(Tensor, name).__get__


# Questions whose answers depend on gradients that only adapters bring. `requires_grad` is not among them: where it is
# true without adapters, as of an argument that wants a gradient, the answer is right already.
_ASKS: dict[Any, str] = {
    _getter("grad_fn"): "asks for a tensor's `grad_fn`",
    _getter("is_leaf"): "asks whether a tensor is a leaf",
    Tensor.register_hook: "registers a hook on a tensor",
    Tensor.register_post_accumulate_grad_hook: "registers a hook on a tensor",
    Tensor.retain_grad: "retains a tensor's gradient",
}
_REQUIRES_GRAD = _getter("requires_grad")


class AutogradUse(TorchFunctionMode):
    """While active, raises `CaptureError` where a model's own code looks at or changes the history of a tensor."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        asks = _ASKS.get(func) or ("asks whether a tensor wants a gradient" if func == _REQUIRES_GRAD else "")
        unsure = asks and torch.is_grad_enabled() and not (func == _REQUIRES_GRAD and result)
        if unsure and not is_asked_by_torch():
            raise CaptureError(f"it {asks}, which no graph does{running_line()}")
        return result


@contextlib.contextmanager
def no_own_backward() -> Iterator[None]:
    """Raise `CaptureError` where a model of this thread applies a function with a backward of its own, to train."""
    thread = threading.get_ident()

    def see(function: type) -> None:
        if threading.get_ident() == thread and torch.is_grad_enabled() and not _is_known(function):
            raise CaptureError(
                f"it applies {function.__name__}, which has a backward of its own, and a graph would go by its forward"
                f"{running_line()}"
            )

    with function_applications_seen(see):
        yield


def _is_known(function: type) -> bool:
    """Whether a function is torch's, or lorafx's own: the replayer of repeated layers has one."""
    return is_torchs_own(function.__module__) or function.__module__.startswith("lorafx.")
