"""The code that checks a captured graph's sizes, as torch.export writes it, in one look at each condition."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP
from torch.utils import _pytree as pytree

_WRITER = "_convert_guards_code_to_fn"


@contextlib.contextmanager
def conditions_written_at_once() -> Iterator[None]:
    """Let torch.export's conditions be written by `written`, where this torch has such a function.

    Without it, torch looks for each argument in each condition: half a million looks for a cache of 80 layers.
    """
    from torch.export import _unlift  # imports Dynamo, which takes seconds

    theirs = getattr(_unlift, _WRITER, None)
    if theirs is not None:
        setattr(_unlift, _WRITER, written)
    try:
        yield
    finally:
        if theirs is not None:
            setattr(_unlift, _WRITER, theirs)


def written(guards_code: Sequence[str], paths_of_placeholders: Sequence[pytree.KeyPath]) -> torch.nn.Module:
    """A module that asserts these conditions on arguments at these paths: torch's, but for parentheses in messages.

    A condition calls an argument `L['z']['k']`, by its path; the code calls it `args[2]`, and its message `z['k']`.
    """
    from torch.export import _unlift

    ways = [pytree.keystr(path) for path in paths_of_placeholders]
    named = {"L" + way: f"{path[0].key}{pytree.keystr(path[1:])}" for way, path in zip(ways, paths_of_placeholders)}  # type: ignore[attr-defined]
    numbers = {"L" + way: number for number, way in enumerate(ways)}
    argument = re.compile("|".join(map(re.escape, sorted(named, key=len, reverse=True))) or "(?!)")
    lines = ["def _(*args):", "  return"]
    for code in guards_code:
        condition = argument.sub(lambda found: f"args[{numbers[found[0]]}]", code)
        message = "Guard failed: " + argument.sub(lambda found: named[found[0]], code.replace("\n", ""))
        lines.insert(-1, f"  torch._assert({condition}, {message!r})")
    names: dict[str, Any] = {**SYMPY_INTERP, "math": math, "inf": math.inf}
    exec("\n".join(lines), names)
    guards = _unlift.GuardsFn()
    guards.forward = torch._dynamo.dont_skip_tracing(names["_"])  # type: ignore[method-assign]
    guards._is_impure = True  # type: ignore[assignment]
    return guards
