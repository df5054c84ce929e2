"""Refusals: lorafx's errors and warnings as lines on standard error, after the command's name."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import ParamSpec

from ..errors import LorafxError

P = ParamSpec("P")


def refusing(command: Callable[P, int]) -> Callable[P, int]:
    """A command that says its errors and warnings so, and whose exit status is 1 for an error."""

    @functools.wraps(command)
    def told(*args: P.args, **kwargs: P.kwargs) -> int:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"{command.__name__}: {message}", file=sys.stderr)
            try:
                return command(*args, **kwargs)
            except (LorafxError, OSError) as error:
                print(f"{command.__name__}: {error}", file=sys.stderr)
                return 1

    return told
