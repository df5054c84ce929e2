"""Interpret: a call runs the model's own Python under an interpreter, and so does each step of one that yields."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from typing import Any

from ..adapters.by_row import ROWS
from ..tree.lookup import module_at
from ..tree.mirror import own_forward
from ..tree.wrappers import innermost
from .call_key import Call
from .per_site import SiteInterpreter


def interpret(interpreter: SiteInterpreter, call: Call) -> tuple[Any, bool]:
    """Run the own Python of the module that is called, with the adapters at each read of an adapted tensor.

    Returns what it gives, and whether it read any.
    """
    with interpreter.active():
        own = {name: value for name, value in call.kwargs.items() if name != ROWS}
        result = own_forward(innermost(module_at(call.tree, call.path)))(*call.args, **own)
    if isinstance(result, Generator):  # nothing has run yet, so nobody knows what it will read
        return _stepwise(interpreter, result), True
    return result, interpreter.acted


def _stepwise(interpreter: SiteInterpreter, generator: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """A forward that yields: its steps run with the adapters, and what its caller does between them without."""
    step = partial(next, generator)
    while True:
        try:
            with interpreter.active():
                item = step()
        except StopIteration as stop:
            return stop.value
        try:
            step = partial(generator.send, (yield item))
        except GeneratorExit:
            generator.close()
            raise
        except BaseException as error:
            step = partial(generator.throw, error)
