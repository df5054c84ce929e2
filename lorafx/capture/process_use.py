"""What a model asks of the process around it: environment variables, and whether torch is in inference mode.

A graph has the answers as constants. So the variables that a model read are noted, for whoever keeps the graph to
watch; and since models are captured outside of inference mode, one that asks for that has no graph.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import CaptureError
from ..torch_private.replacing import environment_replaced, inference_question_replaced
from .frames import is_asked_by_a_library, running_line

ENVIRONMENT = "environment"  # in a graph module's meta: the environment variables that the model has read


class EnvironmentUse:
    """Notes in `names` which environment variables a model reads, there or not."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Note what this thread's model reads inside."""
        thread = threading.get_ident()

        def read(plain: Callable[[Any, str], str], environment: Any, name: str) -> str:
            if threading.get_ident() == thread and isinstance(name, str) and not is_asked_by_a_library():
                self.names.add(name)
            return plain(environment, name)

        with environment_replaced(read):
            yield


@contextlib.contextmanager
def no_question_of_inference() -> Iterator[None]:
    """Raise `CaptureError` where this thread's model asks whether torch is in inference mode."""
    thread = threading.get_ident()

    def ask(plain: Callable[[], bool]) -> bool:
        if threading.get_ident() == thread and not is_asked_by_a_library():
            raise CaptureError(_message())
        return plain()

    with inference_question_replaced(ask), _QuestionsOfTensors():
        yield


class _QuestionsOfTensors(TorchFunctionMode):
    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.is_inference and not is_asked_by_a_library():
            raise CaptureError(_message())
        return func(*args, **(kwargs or {}))


def _message() -> str:
    return f"it asks whether torch is in inference mode, which no graph does{running_line()}"
