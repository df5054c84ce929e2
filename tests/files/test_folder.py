"""Folders are replaced atomically: killed or failing anywhere, what is on disk is the old adapter or the new one."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import models
import pytest
import torch
from safetensors.torch import load_file

import lorafx
from lorafx.errors import LorafxError
from lorafx.files import folder as folder_module
from lorafx.files.checkpoint import CONFIG, OLD_WEIGHTS, WEIGHTS
from lorafx.files.folder import replace_folder

pytestmark = pytest.mark.slow  # many processes, killed one by one

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


def adapter(rank: int) -> lorafx.AdaptedModel:
    """An adapter that can be recognised: each of its values is its rank, its alpha three times that."""
    config = lorafx.LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=["up", "down"])
    lora = lorafx.compile(models.mlp(), config)
    with torch.no_grad():
        for parameter in lora.parameters():
            if parameter.requires_grad:
                parameter.fill_(rank)
    return lora


def rank_of(folder: Path, **how: bool) -> int:
    """The rank of the adapter in a folder, after checking that config, shapes and values all say the same."""
    lora = lorafx.load(models.mlp(), folder, **how)
    config = lora.peft_config["default"]
    assert config.lora_alpha == 3 * config.r
    own = {name: parameter for name, parameter in lora.named_parameters() if "lora_" in name}
    assert len(own) == 4
    for name, parameter in own.items():
        assert parameter.shape[0 if "lora_A" in name else 1] == config.r
        assert bool((parameter == config.r).all()), name
    return config.r


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def partials(place: Path) -> list[Path]:
    return [path for path in place.rglob("*") if ".partial" in path.name]


def furnish(folder: Path) -> dict[str, bytes]:
    """Put files and subfolders of the user's own into a folder; returns them."""
    own = {"notes.txt": b"mine", ".hidden": b"too", "logs/a/events": b"\x00" * 70, "second/adapter_config.json": b"{}"}
    for name, data in own.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return own


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A furnished folder with the adapter of rank 2."""
    folder = tmp_path / "place" / "adapter"
    adapter(2).save_pretrained(folder)
    furnish(folder)
    return folder


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
    with pytest.raises(lorafx.errors.CheckpointError, match=r"file|adapter"):
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
    "write": (folder_module, "_write", 4),
    "fsync": (os, "fsync", 6),
    "replace": (os, "replace", 2),
    "rename": (os, "rename", 4),
    "link": (os, "link", 6),
    "mkdir": (os, "mkdir", 3),
    "copystat": (folder_module.shutil, "copystat", 3),
    "exchange": (folder_module, "_exchange", 1),
    "chdir": (os, "chdir", 1),
}
POINTS = [(what, n) for what, (_, _, calls) in FAULTS.items() for n in range(1, calls + 1)]


def save_one_file(folder: Path) -> None:
    replace_folder(folder, {CONFIG: (folder / CONFIG).read_bytes(), WEIGHTS: b"new"})


def save_all(folder: Path) -> None:
    adapter(5).save_pretrained(folder)


def save_over_pickle(folder: Path) -> None:
    (folder / OLD_WEIGHTS).write_bytes(b"old")
    adapter(5).save_pretrained(folder)


def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a system that cannot swap two folders in one step."""
    monkeypatch.setattr(folder_module, "_exchange", lambda a, b: False)


@pytest.mark.parametrize("fallback", [False, True], ids=["exchange", "two renames"])
@pytest.mark.parametrize("save", [save_one_file, save_all, save_over_pickle])
@pytest.mark.parametrize(("what", "n"), POINTS)
def test_a_failing_save_leaves_the_old_folder_or_the_new_one(
    saved: Path, monkeypatch: pytest.MonkeyPatch, save: Callable, what: str, n: int, fallback: bool
) -> None:
    if save is save_over_pickle:
        (saved / OLD_WEIGHTS).write_bytes(b"old")
    own, before = furnish(saved), contents(saved)
    with monkeypatch.context() as patched:
        if fallback:
            no_exchange(patched)
        module, name, _ = FAULTS[what]
        fault = Fault(getattr(module, name), n)
        patched.setattr(module, name, fault)
        try:
            save(saved)
        except (OSError, LorafxError):
            raised = True
        else:
            raised = False
    assert saved.is_dir(), "the folder is gone"
    after = contents(saved)
    if raised:
        assert after == before
    else:
        assert {name: after.get(name) for name in own} == own
        assert after != before
    assert not partials(saved.parent)


@pytest.mark.parametrize(("what", "n"), POINTS)
def test_a_first_save_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, n: int
) -> None:
    with monkeypatch.context() as patched:
        module, name, _ = FAULTS[what]
        patched.setattr(module, name, Fault(getattr(module, name), n))
        try:
            adapter(2).save_pretrained(tmp_path / "adapter")
        except (OSError, LorafxError):
            assert not (tmp_path / "adapter").exists()
        else:
            assert rank_of(tmp_path / "adapter") == 2
    assert not partials(tmp_path)


def test_saving_works_where_folders_cannot_be_exchanged(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_exchange(monkeypatch)
    own = furnish(saved)
    adapter(5).save_pretrained(saved)
    assert rank_of(saved) == 5
    assert own.items() <= contents(saved).items()
    assert not partials(saved.parent)


def test_saving_works_where_hard_links_are_impossible(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    own = furnish(saved)
    adapter(5).save_pretrained(saved)
    assert rank_of(saved) == 5
    assert own.items() <= contents(saved).items()


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


# --- kills -----------------------------------------------------------------------------------------------------------

HARNESS = textwrap.dedent("""
    import itertools, os, random, signal, sys, time, warnings
    from pathlib import Path
    import torch
    torch.set_num_threads(1)  # this process forks
    warnings.simplefilter("ignore")
    from test_folder import adapter, contents, furnish, rank_of

    def forked(work, stop=None):
        pid = os.fork()
        if pid == 0:
            try:
                work()
            finally:
                os._exit(0)
        if stop is not None:
            time.sleep(stop)
            os.kill(pid, signal.SIGKILL)
        return os.waitpid(pid, 0)[1]

    def killed_at(event):
        left = [event]
        def hook(name, arguments):
            if name.partition(".")[0] in ("os", "open", "shutil", "tempfile", "ctypes"):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)

    def check(folder, own, allowed, **how):
        rank = rank_of(folder, **how)
        assert rank in allowed, (rank, allowed)
        left = contents(folder)
        assert {name: left.get(name) for name in own} == own, sorted(left)
        return rank
""")

RANDOM_KILLS = """
folder, kills = Path(sys.argv[1]) / "adapter", int(sys.argv[2])
adapters = [adapter(rank) for rank in (2, 5, 7)]
adapters[0].save_pretrained(folder)
own, rng, seen = furnish(folder), random.Random(0), []

def save_forever():
    for lora in itertools.cycle(adapters):
        lora.save_pretrained(folder)

for kill in range(kills):
    assert os.WIFSIGNALED(forked(save_forever, stop=rng.uniform(0.001, 0.04))), "the writer ended by itself"
    seen.append(check(folder, own, (2, 5, 7)))
print(len(set(seen)))
"""

EVERY_KILL = """
from safetensors.torch import load_file
two, five = adapter(2), adapter(5)

def prepared(folder, start):
    folder.mkdir(parents=True)
    own = furnish(folder)
    if start == "none":
        return folder / "new", {}, {}
    two.save_pretrained(folder)
    if start == "adapter":
        return folder, own, {}
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    return folder, own, {"weights_only": True}

def killed(start, event):
    folder, own, how = prepared(Path(sys.argv[1]) / start / str(event) / "adapter", start)

    def save():
        killed_at(event)
        five.save_pretrained(folder)

    died = os.WIFSIGNALED(forked(save))
    if start != "none" or folder.exists():
        check(folder, own, (5,) if start == "none" or not died else (2, 5), **how)
    five.save_pretrained(folder)
    check(folder, own, (5,))
    return died

print(min(next(n for n in itertools.count() if not killed(start, n + 1)) for start in ("adapter", "pickle", "none")))
"""


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Run a script with the harness in a process of its own; returns the number it prints."""

    def run(script: str, *arguments: object) -> int:
        command = [sys.executable, "-c", HARNESS + script, str(tmp_path), *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return int(done.stdout.split()[-1])

    yield run


@posix
def test_a_writer_killed_at_random_moments_leaves_a_whole_adapter(harness: Callable[..., int]) -> None:
    assert harness(RANDOM_KILLS, 60) > 1, "the kills came so early that nothing was ever saved"


@posix
def test_a_writer_killed_at_every_step_leaves_a_whole_adapter(harness: Callable[..., int]) -> None:
    assert harness(EVERY_KILL) > 10, "too few steps were seen for the kills to mean anything"


def test_the_marker_check_notices_a_mixed_folder(saved: Path, tmp_path: Path) -> None:
    adapter(5).save_pretrained(tmp_path / "other")
    (saved / WEIGHTS).write_bytes((tmp_path / "other" / WEIGHTS).read_bytes())
    assert load_file(saved / WEIGHTS)
    with pytest.raises((AssertionError, LorafxError)):
        rank_of(saved)
