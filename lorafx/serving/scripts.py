"""Scripts: a function of TorchScript that a model gives an adapted weight is captured, for torch tells nobody inside.

So `linear` in a function that somebody has scripted or traced is a site's operator as it is in Python.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

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
    result = NotImplemented
    if RUNNING.mode is not None:
        result = RUNNING.mode.run_script(Script(plain, function), args, kwargs)
    return plain(function, *args, **kwargs) if result is NotImplemented else result
