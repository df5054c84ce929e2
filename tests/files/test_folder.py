"""Folders are replaced atomically: what is on disk is the old adapter or the new one, wherever a save fails."""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from folders import adapter, contents, furnish, furnished, partials, rank_of

import lorafx
from lorafx.errors import LorafxError
from lorafx.files import folder as folder_module
from lorafx.files import pinned
from lorafx.files.checkpoint import CONFIG, OLD_WEIGHTS, WEIGHTS
from lorafx.files.folder import replace_folder

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A furnished folder with the adapter of rank 2."""
    return furnished(tmp_path)


# --- success ---------------------------------------------------------------------------------------------------------


def test_a_new_folder_and_its_parents_are_made(tmp_path: Path) -> None:
    adapter(2).save_pretrained(tmp_path / "a" / "b" / "c")
    assert rank_of(tmp_path / "a" / "b" / "c") == 2
    assert not partials(tmp_path)


def test_saving_again_replaces_config_and_weights_together(saved: Path) -> None:
    adapter(5).save_pretrained(saved)
    assert rank_of(saved) == 5
    assert not partials(saved.parent)


@pytest.mark.parametrize("rank", [2, 5])
def test_other_files_and_subfolders_survive(saved: Path, rank: int) -> None:
    own = furnish(saved)
    adapter(rank).save_pretrained(saved)
    left = contents(saved)
    assert {name: left.get(name) for name in own} == own


def test_links_survive_as_links(saved: Path) -> None:
    (saved / "link").symlink_to("notes.txt")
    (saved / "dangling").symlink_to("nowhere")
    (saved / "logs" / "up").symlink_to("..")
    adapter(5).save_pretrained(saved)
    assert [os.readlink(saved / name) for name in ("link", "dangling", "logs/up")] == ["notes.txt", "nowhere", ".."]


def test_a_link_to_the_folder_stays_a_link(saved: Path) -> None:
    link = saved.parent / "latest"
    link.symlink_to(saved.name)
    adapter(5).save_pretrained(link)
    assert link.is_symlink()
    assert rank_of(saved) == 5


@posix
def test_the_folder_keeps_its_permissions(saved: Path) -> None:
    saved.chmod(0o750)
    adapter(5).save_pretrained(saved)
    assert stat.S_IMODE(saved.stat().st_mode) == 0o750


@posix
def test_a_new_folder_has_the_permissions_that_mkdir_gives(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    adapter(2).save_pretrained(tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_is_obsolete_goes_in_the_same_step(saved: Path) -> None:
    (saved / OLD_WEIGHTS).write_bytes(b"old")
    adapter(5).save_pretrained(saved)
    assert not (saved / OLD_WEIGHTS).exists()
    assert rank_of(saved) == 5


def test_an_equal_adapter_is_not_written_again(saved: Path) -> None:
    before = (saved / WEIGHTS).stat()
    adapter(2).save_pretrained(saved)
    assert (saved / WEIGHTS).stat().st_ino == before.st_ino
    assert (saved / WEIGHTS).stat().st_mtime_ns == before.st_mtime_ns


def test_a_copy_of_the_folder_made_by_hard_links_is_not_changed_by_saving(saved: Path) -> None:
    kept = saved.parent / "kept"
    kept.mkdir()
    for name in (CONFIG, WEIGHTS):
        os.link(saved / name, kept / name)
    adapter(5).save_pretrained(saved)
    assert rank_of(kept) == 2


# --- the current directory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [".", "logs", "logs/a"])
def test_saving_over_the_current_directory_keeps_it_valid(
    saved: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.chdir(saved / where)
    for rank in (5, 2, 5):
        adapter(rank).save_pretrained(os.path.relpath(saved))
        assert os.path.samefile(".", saved / where)
        assert sorted(os.listdir(".")) == sorted(os.listdir(saved / where))
    assert rank_of(Path(os.path.relpath(saved))) == 5


@posix
def test_saving_works_when_the_current_directory_is_gone(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = saved.parent / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    try:
        adapter(5).save_pretrained(saved)
    finally:
        os.chdir(saved)
    assert rank_of(saved) == 5


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_file_in_the_place_of_the_folder_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "adapter").write_bytes(b"precious")
    with pytest.raises((LorafxError, OSError)):
        adapter(2).save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter").read_bytes() == b"precious"
    assert not partials(tmp_path)


@pytest.mark.parametrize("broken", ["parent is a file", "weights are a folder"])
def test_a_place_that_cannot_be_written_is_a_checkpoint_error_naming_it(tmp_path: Path, broken: str) -> None:
    (tmp_path / "file").write_bytes(b"precious")
    folder = tmp_path / "file" / "adapter" if broken == "parent is a file" else tmp_path / "adapter"
    if broken == "weights are a folder":
        (folder / WEIGHTS / "inside").mkdir(parents=True)
    before = contents(tmp_path)
    with pytest.raises(lorafx.errors.CheckpointError, match=re.escape(str(folder))):
        adapter(2).save_pretrained(folder)
    assert contents(tmp_path) == before


class Fault:
    """Stands for a function and raises at its n-th call."""

    def __init__(self, real: Callable, n: int):
        self.real, self.left = real, n

    def __call__(self, *args: object, **kwargs: object) -> object:
        self.left -= 1
        if self.left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.real(*args, **kwargs)

    @property
    def fired(self) -> bool:
        return self.left <= 0


FAULTS = {
    "write": (folder_module, "write"),
    "fsync": (os, "fsync"),
    "replace": (os, "replace"),
    "rename": (os, "rename"),
    "link": (os, "link"),
    "mkdir": (os, "mkdir"),
    "copystat": (folder_module.shutil, "copystat"),
    "exchange": (folder_module, "_exchange"),
}


def save_one_file(folder: Path) -> None:
    replace_folder(folder, {CONFIG: (folder / CONFIG).read_bytes(), WEIGHTS: b"new"})


def save_all(folder: Path) -> None:
    adapter(5).save_pretrained(folder)


def save_over_pickle(folder: Path) -> None:
    (folder / OLD_WEIGHTS).write_bytes(b"old")
    adapter(5).save_pretrained(folder)


def refuse_with(code: int) -> Callable:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    return refuse


# What systems do when two folders are to be swapped in one step: swap them, know no such call, or refuse to move them.
SYSTEMS: dict[str, Callable] = {
    "exchanges": folder_module._exchange,
    "renames": lambda a, b: False,
    "pinned": refuse_with(errno.EBUSY),
}


def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a system that cannot swap two folders in one step."""
    monkeypatch.setattr(folder_module, "_exchange", SYSTEMS["renames"])


def failing_saves(
    monkeypatch: pytest.MonkeyPatch, start: Path, place: Path, what: str, save: Callable, system: str
) -> Iterator[tuple[Path, bool]]:
    """Copies of the folder `start`, each saved to with one call of a function failing; and whether the save raised."""
    module, name = FAULTS[what]
    for n in itertools.count(1):
        folder = place / f"{what}-{save.__name__}-{system}-{n}" / "adapter"
        shutil.copytree(start, folder) if start.exists() else folder.parent.mkdir(parents=True)
        fault, raised = Fault(getattr(module, name), n), False
        with monkeypatch.context() as patched:
            patched.setattr(folder_module, "_exchange", SYSTEMS[system])
            patched.setattr(module, name, fault)
            if what == "write":
                patched.setattr(pinned, name, fault)
            try:
                save(folder)
            except (OSError, LorafxError):
                raised = True
        if not fault.fired:
            return
        yield folder, raised


@pytest.mark.parametrize("what", FAULTS)
def test_a_failing_save_leaves_the_old_folder_or_the_new_one(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Whichever call of the function fails, of one file and of several, on every system."""
    calls = raises = 0
    for save, system in itertools.product((save_one_file, save_all, save_over_pickle), SYSTEMS):
        if save is save_over_pickle:
            (saved / OLD_WEIGHTS).write_bytes(b"old")
        own, before = furnish(saved), contents(saved)
        for folder, raised in failing_saves(monkeypatch, saved, tmp_path, what, save, system):
            assert folder.is_dir(), "the folder is gone"
            after = contents(folder)
            assert {name: after.get(name) for name in own} == own
            assert (after == before) == raised
            assert not partials(folder.parent)
            calls, raises = calls + 1, raises + raised
    assert calls and bool(raises) == (what != "link"), "what cannot be linked is copied"


def save_first(folder: Path) -> None:
    adapter(2).save_pretrained(folder)


@pytest.mark.parametrize("what", ["write", "fsync", "rename", "mkdir"])
def test_a_first_save_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    raises = 0
    for folder, raised in failing_saves(monkeypatch, tmp_path / "nothing", tmp_path, what, save_first, "exchanges"):
        assert not folder.exists() if raised else rank_of(folder) == 2
        assert not partials(folder.parent)
        raises += raised
    assert raises


def test_saving_works_where_folders_cannot_be_exchanged(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_exchange(monkeypatch)
    own = furnish(saved)
    adapter(5).save_pretrained(saved)
    assert rank_of(saved) == 5
    assert own.items() <= contents(saved).items()
    assert not partials(saved.parent)


def test_saving_works_where_hard_links_are_impossible(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", refuse_with(errno.EPERM))
    own = furnish(saved)
    adapter(5).save_pretrained(saved)
    assert rank_of(saved) == 5
    assert own.items() <= contents(saved).items()


# --- folders that cannot be moved ------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", sorted(pinned.PINNED), ids=errno.errorcode.get)
@pytest.mark.parametrize("refused", ["exchange", "neighbour"])
def test_a_folder_that_cannot_be_moved_is_saved_into_and_a_warning_says_what_is_lost(
    saved: Path, monkeypatch: pytest.MonkeyPatch, refused: str, code: int
) -> None:
    """A mount point refuses the exchange, an unwritable parent the folder to exchange it for."""
    make = folder_module.tempfile.mkdtemp
    if refused == "exchange":
        monkeypatch.setattr(folder_module, "_exchange", refuse_with(code))
    else:
        refuse = refuse_with(code)
        monkeypatch.setattr(
            folder_module.tempfile, "mkdtemp", lambda **how: refuse() if how["dir"] == saved.parent else make(**how)
        )
    own = furnish(saved)
    with pytest.warns(UserWarning, match=f"{re.escape(str(saved))} cannot be exchanged.*without {CONFIG}"):
        adapter(5).save_pretrained(saved)
    assert rank_of(saved) == 5
    assert own.items() <= contents(saved).items()
    assert not partials(saved.parent)


def test_a_folder_that_has_nothing_to_lose_is_saved_into_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(folder_module, "_exchange", SYSTEMS["pinned"])
    adapter(2).save_pretrained(tmp_path)
    assert rank_of(tmp_path) == 2 and not [w for w in recwarn if "exchanged" in str(w.message)]


def test_an_interrupted_save_is_refused_and_says_where_the_files_are(saved: Path) -> None:
    left = saved / ".abc.partial"
    (left / "old").mkdir(parents=True)
    (saved / CONFIG).rename(left / "old" / CONFIG)
    with pytest.raises(lorafx.errors.CheckpointError, match=f"{CONFIG}.*interrupted.*{re.escape(str(left))}"):
        rank_of(saved)


def test_one_failing_adapter_of_several_leaves_each_folder_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = adapter(2)
    lora.add_adapter("second", lorafx.LoraConfig(r=3, lora_alpha=9, target_modules=["up"]))
    lora.save_pretrained(tmp_path)
    before = contents(tmp_path)
    with torch.no_grad():
        lora.up.lora_A.second.weight.fill_(1)
    with monkeypatch.context() as patched, pytest.raises((OSError, LorafxError)):
        patched.setattr(os, "replace", Fault(os.replace, 1))
        lora.save_pretrained(tmp_path)
    assert contents(tmp_path) == before


def test_the_marker_check_notices_a_mixed_folder(saved: Path, tmp_path: Path) -> None:
    adapter(5).save_pretrained(tmp_path / "other")
    (saved / WEIGHTS).write_bytes((tmp_path / "other" / WEIGHTS).read_bytes())
    with pytest.raises((AssertionError, LorafxError)):
        rank_of(saved)
