"""A large folder written file by file, under another name until it is whole; a writer that was killed goes on later.

The folder `out` is `.out.partial` while it is written. Each file in it gets its name when the disk has it, so what is
there under its name is whole. A note says what the folder is to become: who comes with the same note finds the files
that are done, and who comes with another one begins anew. A lock keeps two writers apart.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import CheckpointError
from .disk import sync, write

_NOTE = ".becoming"


@dataclass(frozen=True)
class Staging:
    """A folder `out` that is being written; `folder` is where it is until it is whole."""

    out: Path
    folder: Path

    def has(self, name: str, nbytes: int) -> bool:
        """Whether an earlier writer has finished a file of that name and length."""
        file = self.folder / name
        return file.is_file() and file.stat().st_size == nbytes

    def add(self, name: str, written: Callable[[Path], object]) -> None:
        """Add a file that `written` writes at a path, and brings to the disk, in the place of one of that name."""
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_name(f".{target.name}.partial")
        written(staged)
        os.replace(staged, target)
        sync(target.parent)

    def missing_bytes(self, sizes: dict[str, int]) -> int:
        """How many bytes the disk lacks for those of these files that are not there yet; 0 if there is room."""
        wanted = sum(size for name, size in sizes.items() if not self.has(name, size))
        return max(0, wanted - shutil.disk_usage(self.folder).free)


def require_free(out: Path) -> None:
    """Raise `CheckpointError` where no new folder can be put at `out`: there may at most be an empty one."""
    if out.is_dir() and os.path.ismount(out):
        raise CheckpointError(f"{out} is mounted, so no other folder can take its place; name a folder in it")
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is there already; delete it first, or choose another name")


@contextlib.contextmanager
def staged(out: Path, note: str) -> Iterator[Staging]:
    """A folder to write to, which is `out` after the `with` block; on an error it is left for the next who comes.

    Raises `CheckpointError` if there is an `out`, if another process writes it, and for what the file system refuses.
    """
    out = out.resolve()
    require_free(out)
    folder = out.with_name(f".{out.name}.partial")
    lock = FileLock(out.with_name(f".{out.name}.lock"), timeout=0)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with lock:
            try:
                _begin(folder, note)
                yield Staging(out, folder)
                _finish(folder, out)
            finally:
                Path(lock.lock_file).unlink(missing_ok=True)
    except Timeout as error:
        raise CheckpointError(f"another process is writing {out}; wait for it, or choose another name") from error
    except OSError as error:
        raise CheckpointError(f"{out} could not be written: {error}") from error


def _begin(folder: Path, note: str) -> None:
    """Keep what an earlier writer left if it has the same note; else begin an empty folder with this one."""
    mark = folder / _NOTE
    if mark.is_file() and mark.read_text(encoding="utf-8") == note:
        return
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    write(mark, note.encode())


def _finish(folder: Path, out: Path) -> None:
    """Give the folder its name. The note goes afterwards: who is killed before that does not begin anew."""
    for left in folder.rglob(".*.partial"):
        left.unlink()
    sync(folder)
    if out.exists():
        out.rmdir()
    os.rename(folder, out)
    (out / _NOTE).unlink()
    sync(out.parent)
