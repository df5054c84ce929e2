"""What a model asks of the process around it: environment variables, and whether torch is in inference mode.

A graph has the answers as constants. So the variables that a model read are noted, for whoever keeps the graph to
watch; and since models are captured outside of inference mode, one that asks for that has no graph.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import CaptureError
from ..torch_private.replacing import environment_replaced, inference_question_replaced
from .purity import place_of

ENVIRONMENT = "environment"  # in a graph module's meta: the environment variables that the model has read
_HANDING_ON = {"os", "collections.abc", "torch.overrides"}  # these hand a model's questions on, as lorafx does


class EnvironmentUse:
    """Notes in `names` which environment variables a model reads, there or not."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Note what this thread's model reads inside."""
        thread = threading.get_ident()

        def read(plain: Callable[[Any, str], str], environment: Any, name: str) -> str:
            if threading.get_ident() == thread and isinstance(name, str) and not _is_asked_by_a_library():
                self.names.add(name)
            return plain(environment, name)

        with environment_replaced(read):
            yield


@contextlib.contextmanager
def no_question_of_inference() -> Iterator[None]:
    """Raise `CaptureError` where this thread's model asks whether torch is in inference mode."""
    thread = threading.get_ident()

    def ask(plain: Callable[[], bool]) -> bool:
        if threading.get_ident() == thread and not _is_asked_by_a_library():
            raise CaptureError(_message())
        return plain()

    with inference_question_replaced(ask), _QuestionsOfTensors():
        yield


class _QuestionsOfTensors(TorchFunctionMode):
    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.is_inference and not _is_asked_by_a_library():
            raise CaptureError(_message())
        return func(*args, **(kwargs or {}))


def _message() -> str:
    return f"it asks whether torch is in inference mode, which no graph does{place_of(traceback.extract_stack())}"


def _is_asked_by_a_library() -> bool:
    """Whether torch itself asks, or a part of Python's library, and not the model."""
    frame: Any = inspect.currentframe()
    while frame is not None and ((home := _home(frame)) in _HANDING_ON or home.startswith("lorafx.")):
        frame = frame.f_back
    package = _home(frame).partition(".")[0] if frame is not None else ""
    return package == "torch" or (package != "__main__" and package in sys.stdlib_module_names)


def _home(frame: Any) -> str:
    return str(frame.f_globals.get("__name__", ""))
