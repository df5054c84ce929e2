"""Own backward: an autograd function of the model's that computes with an adapted weight, y = Function.apply(x, W).

Its forward runs without gradients, and its backward knows of no adapter: what one adds there would act and never train.
A module that it calls is another matter, for such a function calls it again in backward, as checkpoints do.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterator
from types import CodeType

import torch
from torch import nn

from ..capture.frames import running_line
from ..errors import UncoveredOperatorError
from ..torch_private.replacing import function_applications_seen

_LIBRARIES = ("torch.", "lorafx.")  # whose functions run what they are given again


class OwnBackward:
    """The functions with a backward of their own that a thread has applied."""

    def __init__(self) -> None:
        self._forwards: set[CodeType] = set()

    @contextlib.contextmanager
    def seen(self) -> Iterator[None]:
        """Take note of those that this thread applies meanwhile."""
        thread = threading.get_ident()

        def see(function: type) -> None:
            code = getattr(getattr(function, "forward", None), "__code__", None)
            if code is not None and threading.get_ident() == thread and not function.__module__.startswith(_LIBRARIES):
                self._forwards.add(code)

        with function_applications_seen(see):
            yield

    def require_none(self, part: str) -> None:
        """Raise `UncoveredOperatorError` if the forward of such a function runs now, and has called no module since."""
        frame = inspect.currentframe() if self._forwards and not torch.is_grad_enabled() else None
        while frame is not None and frame.f_code is not nn.Module.__call__.__code__:
            if frame.f_code in self._forwards:
                raise UncoveredOperatorError(
                    f"{part or 'the model'}: {frame.f_code.co_qualname} reads an adapted weight, and the backward that "
                    f"comes with it knows of no adapter, so none would train{running_line()}"
                )
            frame = frame.f_back
