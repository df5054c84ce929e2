"""A large folder that is written file by file: it appears when it is whole, and who was killed goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lorafx.errors import CheckpointError
from lorafx.files.staging import Staging, require_free, staged


def fill(out: Path, note: str = "note", names: str = "abc", stop: str = "") -> list[str]:
    """Write a folder with a file for each name; returns those that were written now. Stops before one of them."""
    written = []
    with staged(out, note) as stage:
        for name in names:
            if name == stop:
                raise KeyboardInterrupt
            if not stage.has(f"sub/{name}", 3):
                stage.add(f"sub/{name}", lambda file: file.write_bytes(b"..." if note == "note" else b"new"))
                written.append(name)
    return written


def contents(out: Path) -> dict[str, bytes]:
    return {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()}


def test_a_folder_appears_when_it_is_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    with staged(out, "note") as stage:
        stage.add("a", lambda file: file.write_bytes(b"..."))
        assert not out.exists() and stage.out == out
    assert contents(tmp_path) == {"deep/out/a": b"..."}


def test_what_was_done_is_not_done_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "out", stop="c")
    assert not (tmp_path / "out").exists()
    assert fill(tmp_path / "out") == ["c"]
    assert contents(tmp_path) == {f"out/sub/{name}": b"..." for name in "abc"}


def test_what_was_begun_for_something_else_is_not_used(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "out", stop="c")
    assert fill(tmp_path / "out", note="other", names="ax") == ["a", "x"]
    assert contents(tmp_path) == {f"out/sub/{name}": b"new" for name in "ax"}


def test_a_file_that_was_not_finished_is_written_again(tmp_path):
    def half(file: Path) -> None:
        file.write_bytes(b"..")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "out", "note") as stage:
        stage.add("sub/a", half)
    assert fill(tmp_path / "out", names="b") == ["b"]
    assert contents(tmp_path) == {"out/sub/b": b"..."}  # and the half one is gone


def test_an_empty_folder_is_replaced_and_any_other_thing_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    fill(tmp_path / "empty")
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for taken in ("empty", "file", "link"):
        with pytest.raises(CheckpointError, match="is there already"):
            require_free(tmp_path / taken)
    with pytest.raises(CheckpointError, match="is there already"):
        fill(tmp_path / "empty")
    assert contents(tmp_path / "empty") == {f"sub/{name}": b"..." for name in "abc"}


def test_a_mounted_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    with pytest.raises(CheckpointError, match=r"is mounted.*name a folder in it"):
        fill(tmp_path)


def test_two_writers_are_kept_apart(tmp_path):
    with staged(tmp_path / "out", "note"):
        with pytest.raises(CheckpointError, match="another process is writing"):
            fill(tmp_path / "out", note="other")
        fill(tmp_path / "out2")
    assert contents(tmp_path / "out") == {} and (tmp_path / "out").is_dir()


def test_what_the_system_refuses_is_one_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match="could not be written"):
        fill(tmp_path / "file" / "out")
    with pytest.raises(CheckpointError, match="could not be written"), staged(tmp_path / "out", "note") as stage:
        stage.add("a", lambda file: (tmp_path / "none" / "x").write_bytes(b""))


def test_a_disk_that_is_full_is_seen_before(tmp_path):
    (tmp_path / "a").write_bytes(b"...")
    stage = Staging(tmp_path / "out", tmp_path)
    assert stage.missing_bytes({"a": 3, "b": 1000}) == 0
    assert stage.missing_bytes({"a": 3, "b": 1 << 60}) > 1 << 59


KILLED = """
import os, signal, sys
from pathlib import Path
from test_staging import contents, fill

def killed_at(event):
    left = [event]
    def hook(name, arguments):
        if name.partition(".")[0] in ("os", "open", "shutil", "fcntl"):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

event = 0
while True:
    event += 1
    out = Path(sys.argv[1]) / str(event) / "out"
    pid = os.fork()
    if pid == 0:
        killed_at(event)
        fill(out)
        os._exit(0)
    died = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    if not out.exists():
        fill(out)
    whole = {f"sub/{name}": b"..." for name in "abc"}
    left = {name: data for name, data in contents(out).items() if name != ".becoming"}
    assert left == whole, (event, left)
    if not died:
        break
print(event)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL") or not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.slow
def test_a_writer_that_is_killed_at_any_step_leaves_a_whole_folder_or_none(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 20
