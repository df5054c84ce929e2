"""Replace files of a folder that stays where it is: one that is mounted, or whose parent is not ours to write.

Such a folder cannot trade places with a new one, so its files change one after another. The old ones are moved out of
the way, the first before all others, and the new ones moved in, the first after all others. A reader that asks for the
first finds either the old files, or none, or the new ones, but never some of each.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from .disk import Content, sync, write

# What a system answers where a folder cannot be moved, or can have no neighbour: it is a mount point, belongs to a
# container's image, or its parent is read-only or somebody else's.
PINNED = {errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS}


def has_mounts(folder: Path) -> bool:
    """Whether a folder, or one below it, is a mount point, as Linux lists them; it is given as `resolve` returns it.

    Exchanging such a folder would take what is mounted elsewhere. Other systems refuse that by an error in `PINNED`.
    """
    try:
        table = Path("/proc/self/mountinfo").read_bytes()
    except OSError:
        return False
    points = (line.split(b" ")[4] for line in table.splitlines())
    named = (re.sub(rb"\\(\d{3})", lambda octal: bytes([int(octal[1], 8)]), point) for point in points)
    return any(Path(os.fsdecode(point)).is_relative_to(folder) for point in named)


def replace_in_turn(folder: Path, files: Mapping[str, Content], gone: Iterable[str]) -> bool:
    """Give a folder these files, and delete those that are to be `gone`, in the order that the module describes.

    Returns whether there were old ones. Raises `OSError`, and then the folder has its old files. If the process is
    killed meanwhile, what is missing is in a subfolder `.….partial`, the old files in `old` below that.
    """
    names = [*files, *gone]
    staged = Path(tempfile.mkdtemp(prefix=".", suffix=".partial", dir=folder))
    old = staged / "old"
    try:
        old.mkdir()
        for name, data in files.items():
            write(staged / name, data)
        sync(staged)
        replaced = [name for name in names if os.path.lexists(folder / name)]
        try:
            for name in replaced:
                os.rename(folder / name, old / name)
            for name in reversed(list(files)):
                os.rename(staged / name, folder / name)
        except BaseException:
            _restore(folder, old, names)
            raise
        sync(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return bool(replaced)


def interrupted(folder: Path) -> Path | None:
    """Where a process that was killed while it replaced a folder's files left them, if one was."""
    return next((entry for entry in folder.glob(".*.partial") if (entry / "old").is_dir()), None)


def _restore(folder: Path, old: Path, names: Iterable[str]) -> None:
    for name in reversed(list(names)):
        if os.path.lexists(old / name):
            os.replace(old / name, folder / name)
