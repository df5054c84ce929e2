"""Write files and folders, and wait until the disk has them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write(file: Path, data: bytes) -> None:
    """Write a file, and wait until the disk has it."""
    with open(file, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


def sync(folder: Path) -> None:
    """Wait until the disk knows of the files that were made in, moved into or deleted from a folder."""
    with contextlib.suppress(OSError):  # not every file system lets a folder be synced
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
