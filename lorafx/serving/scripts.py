"""Scripts: a function of TorchScript that a model gives an adapted weight is captured, for torch tells nobody inside.

So `linear` in a function that somebody has scripted or traced is a site's operator as it is in Python.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..capture.frames import running_line
from ..errors import CaptureError, UncoveredOperatorError
from ..torch_private.tensors import DisableTorchFunction
from ..tree.hooks import RUNNING


@dataclass(frozen=True)
class Script:
    """A function or method of TorchScript as a Python function, equal to another one of the same."""

    plain: Callable[..., Any] = field(compare=False)
    function: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with DisableTorchFunction():  # what torch tells of a method has its arguments in another order
            return self.plain(self.function, *args, **kwargs)

    @property
    def __name__(self) -> str:
        return str(self.function.name)


def run_script(plain: Callable[..., Any], function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a function of TorchScript gives, whoever calls it; within a model's own Python, with the adapters."""
    if RUNNING.mode is None or not RUNNING.mode.acts_on((*args, *kwargs.values())):
        return plain(function, *args, **kwargs)
    return _run_site(RUNNING.mode, Script(plain, function), args, kwargs)


def _run_site(interpreter: Any, script: Script, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a function of TorchScript gives that reads an adapted tensor.

    Raises `UncoveredOperatorError` if it can be no graph, as a method of a scripted module.
    """
    interpreter.see_all()
    interpreter.acted = True
    with interpreter.suspended():
        try:
            return interpreter.through_a_graph(script, args, kwargs)
        except CaptureError as error:
            where, place = interpreter.parts[-1] or "the model", running_line()
            raise UncoveredOperatorError(
                f"{where}: {script.__name__} of TorchScript reads an adapted weight, where no adapter can act: "
                f"call the Python that it was made of{place}"
            ) from error
