"""Replace files of a folder atomically: a reader sees all old files or all new ones.

One changed file is renamed into place. Several are written into a new folder, which shares the unchanged files with the
old one by hard links, and the two folders trade names in one system call. On systems without such a call (it is
Linux's) two renames do it, between which the folder does not exist. A folder that cannot be moved at all has its files
replaced one after another (`pinned.py`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from ..errors import warn
from .disk import Content, holds, sync, write
from .pinned import PINNED, has_mounts, replace_in_turn

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def replace_folder(folder: Path, files: Mapping[str, Content], obsolete: Sequence[str] = ()) -> None:
    """Give `folder` these files in place of those of the same names, and delete the `obsolete` ones.

    Other files and subfolders stay. `folder` and its parents are made if need be. If the process is killed, the folder
    holds its old files or the new ones (on Linux, see above). A folder that cannot be moved is an exception: there a
    kill may leave it without its first file, which a warning says. Raises `OSError` for what the file system refuses,
    and where a file stands in the folder's place or a folder in a file's.
    """
    folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "there is a file of that name", str(folder))
    if clash := next((name for name in (*files, *obsolete) if (folder / name).is_dir()), None):
        raise IsADirectoryError(errno.EISDIR, "there is a folder in the place of a file", str(folder / clash))
    folder.parent.mkdir(parents=True, exist_ok=True)
    gone = [name for name in obsolete if (folder / name).exists()]
    changed = {name: data for name, data in files.items() if not holds(folder / name, data)}
    if folder.is_dir() and len(changed) + len(gone) <= 1:
        _replace_single(folder, changed, gone)
    elif folder.is_dir() and has_mounts(folder):
        _replace_pinned(folder, changed, gone, "it is mounted, or a folder in it is")
    else:
        try:
            _replace_whole(folder, files, gone)
        except OSError as error:
            if error.errno not in PINNED or not folder.is_dir():
                raise
            _replace_pinned(folder, changed, gone, os.strerror(error.errno))


def _replace_whole(folder: Path, files: Mapping[str, Content], gone: Sequence[str]) -> None:
    """Write a new folder beside the old one, if there is one, and let the two trade names."""
    staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        if folder.is_dir():
            _share(folder, staged, leave_out={*files, *gone})
            shutil.copystat(folder, staged)
        else:
            staged.chmod(0o777 & ~_umask())
        for name, data in files.items():
            write(staged / name, data)
        sync(staged)
        with _standing_where_we_stand(folder):
            _trade(staged, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _replace_pinned(folder: Path, changed: Mapping[str, Content], gone: Sequence[str], reason: str) -> None:
    if replace_in_turn(folder, changed, gone):
        warn(
            f"{folder} cannot be exchanged for a new folder at once ({reason}), so its files were replaced one after "
            f"another: a process that is killed meanwhile leaves it without {next(iter((*changed, *gone)))}"
        )


@contextlib.contextmanager
def _standing_where_we_stand(folder: Path) -> Iterator[None]:
    """Enter the current folder again by its path, if it is in `folder`, which is exchanged meanwhile."""
    try:
        here = Path.cwd()
    except FileNotFoundError:  # the current folder has been deleted
        here = None
    yield
    if here is not None and here.is_relative_to(folder):
        os.chdir(here)


def _replace_single(folder: Path, changed: Mapping[str, Content], gone: Sequence[str]) -> None:
    for name, data in changed.items():
        staged = folder / f".{name}.partial"
        try:
            write(staged, data)
            os.replace(staged, folder / name)
        finally:
            staged.unlink(missing_ok=True)
    for name in gone:
        (folder / name).unlink()
    sync(folder)


def _share(old: Path, new: Path, leave_out: Collection[str] = ()) -> None:
    for entry in old.iterdir():
        if entry.name in leave_out:
            continue
        if entry.is_dir() and not entry.is_symlink():
            (new / entry.name).mkdir()
            _share(entry, new / entry.name)
            shutil.copystat(entry, new / entry.name)
        else:
            _link(entry, new / entry.name)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.EXDEV:  # what lies there is mounted: it must neither be copied nor deleted
            raise
        shutil.copy2(source, target, follow_symlinks=False)


def _trade(staged: Path, folder: Path) -> None:
    """Put `staged` where `folder` is; what was there, if anything, is at `staged` afterwards."""
    if not folder.exists():
        os.rename(staged, folder)
    elif not _exchange(staged, folder):
        aside = staged.with_name(f"{staged.name}.old")  # no system call for it here: two renames
        os.rename(folder, aside)
        try:
            os.rename(staged, folder)
        except BaseException:
            os.rename(aside, folder)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap the names of two folders in one step, where the system can (Linux's renameat2)."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(code, os.strerror(code), str(b))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
