"""A writer that is killed, anywhere, leaves the old adapter or the new one."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,  # many processes, killed one by one
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL"),
]

HARNESS = textwrap.dedent("""
    import itertools, os, random, signal, sys, time, warnings
    from pathlib import Path
    import torch
    torch.set_num_threads(1)  # this process forks
    warnings.simplefilter("ignore")
    from folders import adapter, contents, furnish, rank_of

    def forked(work, stop=None):
        pid = os.fork()
        if pid == 0:
            try:
                work()
            finally:
                os._exit(0)
        if stop is not None:
            stop()
            os.kill(pid, signal.SIGKILL)
        return os.waitpid(pid, 0)[1]

    # What only looks: killed there, a writer leaves what it leaves at the event that comes next.
    LOOKS = {"os.listdir", "os.scandir", "os.listxattr", "shutil.copystat", "shutil.rmtree", "ctypes.dlopen"}

    def killed_at(event):
        left = [event]
        def hook(name, arguments):
            if name.partition(".")[0] in ("os", "open", "shutil", "tempfile", "ctypes") and name not in LOOKS:
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
reader, writer = os.pipe()

def save_forever():
    for number in itertools.count(1):
        adapters[number % 3].save_pretrained(folder)
        if number == 2:
            os.write(writer, b"!")

def some_time():
    os.read(reader, 1)  # two adapters are saved: a busy machine may take any time for that
    time.sleep(rng.uniform(0, 0.02))

for kill in range(kills):
    assert os.WIFSIGNALED(forked(save_forever, stop=some_time)), "the writer ended by itself"
    seen.append(check(folder, own, (2, 5, 7)))
print(len({2, *seen}))
"""

EVERY_KILL = """
import errno
from safetensors.torch import load_file
from lorafx.errors import CheckpointError
from lorafx.files import folder as folder_module
two, five = adapter(2), adapter(5)

def prepared(folder, start):
    folder.mkdir(parents=True)
    own = furnish(folder)
    if start == "none":
        return folder / "new", {}, {}
    two.save_pretrained(folder)
    if start in ("adapter", "pinned"):
        return folder, own, {}
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    return folder, own, {"weights_only": True}

def busy(a, b):
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

lost = []  # kills between the last of the old files and the first of the new ones

def refused(folder):
    try:
        rank_of(folder)
    except CheckpointError as error:
        return "interrupted" in str(error)

def killed(start, event):
    folder, own, how = prepared(Path(sys.argv[1]) / start / str(event) / "adapter", start)

    def save():
        if start == "pinned":
            folder_module._exchange = busy
        killed_at(event)
        five.save_pretrained(folder)

    died = os.WIFSIGNALED(forked(save))
    if start == "pinned" and refused(folder):
        lost.append(event)
    elif start != "none" or folder.exists():
        check(folder, own, (5,) if start == "none" or not died else (2, 5), **how)
    five.save_pretrained(folder)
    check(folder, own, (5,))
    return died

starts = "adapter", "pickle", "none", "pinned"
steps = min(next(n for n in itertools.count() if not killed(start, n + 1)) for start in starts)
assert 0 < len(lost) < 10, lost
print(steps)
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


def test_a_writer_killed_at_random_moments_leaves_a_whole_adapter(harness: Callable[..., int]) -> None:
    assert harness(RANDOM_KILLS, 30) > 1, "nothing was ever saved"


def test_a_writer_killed_at_every_step_leaves_a_whole_adapter(harness: Callable[..., int]) -> None:
    assert harness(EVERY_KILL) > 5, "too few steps were seen for the kills to mean anything"
