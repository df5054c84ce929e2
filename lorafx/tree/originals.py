"""Originals: modules of the base, which may run in the place of their mirrors, reached by ways that nobody redirects.

A module that somebody replaces in the base is replaced there alone, for a mirror has children of its own.
"""

from __future__ import annotations

import inspect
from types import FrameType

from torch import Tensor, nn


class Originals:
    """The modules of a base as they were when it was mirrored."""

    def __init__(self, base: nn.Module):
        self._paths = [path for path, module in base.named_modules() if module._modules]
        self._now = [module._modules for module in base.modules() if module._modules]
        self._known = [children.copy() for children in self._now]

    def replaced(self) -> list[str]:
        """Paths of those that somebody has replaced, added or taken away, each said once."""
        if self._now == self._known:
            return []
        found = [
            f"{path}.{name}".lstrip(".")
            for path, now, known in zip(self._paths, self._now, self._known)
            for name in {**known, **now}
            if now.get(name) is not known.get(name)
        ]
        self._known = [children.copy() for children in self._now]
        return found


def other_mode(tensor: Tensor, twin: nn.Module) -> str:
    """What to say if the base's own module reads a parameter now, training where its twin in the mirror does not.

    Empty if none does. It is looked for among the functions that are running, which takes a while.
    """
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and module.training != twin.training and _has(module, tensor):
            return _message(module, twin)
        frame = frame.f_back
    return ""


def _has(module: nn.Module, tensor: Tensor) -> bool:
    return any(parameter is tensor for parameter in module._parameters.values())


def _message(module: nn.Module, twin: nn.Module) -> str:
    wanted, found = ("train", "evaluation") if twin.training else ("eval", "training")
    return (
        f"the base's own {type(module).__name__} runs here, reached by another way than the module tree. It is in "
        f"{found} mode and the adapted model is not: call `{wanted}()` of the base as well"
    )
