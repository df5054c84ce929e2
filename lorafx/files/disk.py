"""Write files and folders, and wait until the disk has them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

# What is in a file: all of it, or pieces, one after another, which nobody has to join in memory.
Content = bytes | Sequence[bytes | memoryview]


def write(file: Path, content: Content) -> None:
    """Write a file, and wait until the disk has it."""
    with open(file, "wb") as out:
        for piece in _pieces(content):
            out.write(piece)
        out.flush()
        os.fsync(out.fileno())


def holds(file: Path, content: Content) -> bool:
    """Whether this is what is in a file already."""
    pieces = _pieces(content)
    if not file.is_file() or file.stat().st_size != sum(map(len, pieces)):
        return False
    with open(file, "rb") as there:
        return all(there.read(len(piece)) == piece for piece in pieces)


def _pieces(content: Content) -> Sequence[bytes | memoryview]:
    return (content,) if isinstance(content, bytes) else content


def sync(folder: Path) -> None:
    """Wait until the disk knows of the files that were made in, moved into or deleted from a folder."""
    with contextlib.suppress(OSError):  # not every file system lets a folder be synced
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
