"""What an adapter may be called: its name is part of parameter names, of generated Python and of a folder's path."""

from __future__ import annotations

import keyword
import os
import unicodedata

from torch import nn

from ..errors import AdapterError

BASE = "__base__"  # PEFT's name for no adapter, where rows name theirs
LONGEST = 200  # bytes: file systems take 255, and a folder that is being written has a longer name for a moment


def require_usable(name: str) -> None:
    """Raise `AdapterError` for a name with which an adapter could not run, or not be saved by itself, saying why."""
    if why := _objection(name):
        raise AdapterError(f"{name!r} cannot name an adapter: {why}")


def _objection(name: str) -> str | None:
    if not isinstance(name, str) or not name:
        return "a name is a string that is not empty"
    if set(name) & set("./\\"):
        return "no dots, no slashes"
    if not name.isprintable() or '"' in name:
        return "no line breaks, no other characters that do not print, no double quotes"
    if keyword.iskeyword(name):
        return "it is a keyword of Python"
    if unicodedata.normalize("NFKC", name) != name:
        return f"Python reads it as {unicodedata.normalize('NFKC', name)!r}; use that"
    if len(os.fsencode(name)) > LONGEST:
        return f"it is longer than {LONGEST} bytes, too long for a folder"
    if name == BASE:
        return "it is what rows of a batch say that have none"
    if hasattr(nn.Module(), name):
        return "it is the name of a module's method or attribute"
    return None
