"""Code of peft's that asks an adapted model, or its config, for something: it cannot read what lorafx has made."""

from __future__ import annotations

import inspect

from ..errors import AdapterError


def refuse_peft_itself(instead: str) -> None:
    """Raise `AdapterError` if it is code of peft's that asks, saying what its user should call.

    peft's functions take an adapted model for one of peft's own. They look for peft's layers in it, find none, and
    would leave out what these hold, without a word.
    """
    if function := asking_function_of_peft():
        raise AdapterError(f"peft's own `{function}` cannot read a model that lorafx adapted; use {instead}")


def asking_function_of_peft() -> str | None:
    """The name of peft's function that asks lorafx for something; None if it is somebody else who asks."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith("lorafx."):
        frame = frame.f_back
    of_peft = frame is not None and frame.f_globals.get("__name__", "").startswith("peft.")
    return frame.f_code.co_name if frame is not None and of_peft else None
