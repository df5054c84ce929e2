"""What a model asks of autograd, or tells it, while it runs: a graph has the operators of forward and none of that.

The model is captured without adapters, so nothing that it computes wants a gradient then, as it does later. A branch on
that would be taken wrongly, and a tensor's hook or a function's own backward would be lost without a word.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import CaptureError
from ..torch_private.replacing import function_applications_seen
from .purity import place_of


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
_HANDING_ON = ("torch._tensor", "torch.overrides", "torch.utils._contextlib", __name__.partition(".")[0] + ".")
_REQUIRES_GRAD = _getter("requires_grad")


class AutogradUse(TorchFunctionMode):
    """While active, raises `CaptureError` where a model's own code looks at or changes the history of a tensor."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        asks = _ASKS.get(func) or ("asks whether a tensor wants a gradient" if func == _REQUIRES_GRAD else "")
        unsure = asks and torch.is_grad_enabled() and not (func == _REQUIRES_GRAD and result)
        if unsure and not is_asked_by_torch():
            raise CaptureError(f"it {asks}, which no graph does{place_of(traceback.extract_stack())}")
        return result


@contextlib.contextmanager
def no_own_backward() -> Iterator[None]:
    """Raise `CaptureError` where a model of this thread applies a function with a backward of its own, to train."""
    thread = threading.get_ident()

    def see(function: type) -> None:
        if threading.get_ident() == thread and torch.is_grad_enabled() and not _is_known(vars(function)):
            raise CaptureError(
                f"it applies {function.__name__}, which has a backward of its own, and a graph would go by its forward"
                f"{place_of(traceback.extract_stack())}"
            )

    with function_applications_seen(see):
        yield


def is_asked_by_torch() -> bool:
    """Whether torch's own code called the torch function that a mode is given now, and not the model's.

    Below it are the methods by which tensors and modes hand a call on.
    """
    frame: Any = inspect.currentframe()
    while frame.f_globals.get("__name__", "").startswith(_HANDING_ON):
        frame = frame.f_back
    return _is_torchs_own(frame.f_globals)


def _is_known(names: Any) -> bool:
    """Whether a function is torch's, or lorafx's own: the replayer of repeated layers has one."""
    return _is_torchs_own(names) or names.get("__module__", "").startswith(__name__.partition(".")[0] + ".")


def _is_torchs_own(names: Any) -> bool:
    """Whether a frame's globals, or a class's attributes, are of torch itself."""
    home = names.get("__name__") or names.get("__module__") or ""
    return home == "torch" or home.startswith("torch.")
