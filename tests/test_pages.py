"""The pages about tasks run from top to bottom, as a reader follows them."""

from __future__ import annotations

import copy
import re
import shlex
from pathlib import Path

import pytest
import torch
from modules import tiny_llama
from torch.distributed.run import main as torchrun

from lorafx import commands

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
FILE = re.compile(r"# ([\w-]+\.py)\n")  # the first line of a block that is a script to be started

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def follow(page: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """Do what a page says, in the present folder; returns all that was printed.

    Blocks of Python run one after another in one process, but for scripts, which are written to the file that their
    first line names. Commands of a shell are run; of text, each line has to have been printed, where … stands for
    anything. Blocks of `py` and `console` are for reading.
    """
    namespace: dict = {"__name__": "page"}
    printed = ""
    for kind, block in BLOCK.findall(page.read_text()):
        if kind == "python" and (file := FILE.match(block)):
            Path(file[1]).write_text(block)
        elif kind == "python":
            exec(compile(block, page.name, "exec"), namespace)
        elif kind == "sh":
            for line in block.splitlines():
                run(line)
        printed += capfd.readouterr().out
        for line in block.splitlines() if kind == "text" else ():
            pattern = ".*".join(map(re.escape, line.strip().split("…")))
            assert re.search(pattern, printed), f"{page.name}: not printed: {line}\n{printed}"
    return printed


def run(line: str) -> None:
    """Run a line of a shell: commands that are Python's by their functions, which saves starting it."""
    first, *words = shlex.split(line, comments=True)
    if first == "lorafx":
        assert commands.run(words) == 0, line
    else:
        assert first == "torchrun", line
        torchrun(words)  # raises where one of its processes fails


def test_the_first_example_of_all_runs(tmp_path, monkeypatch, capsys):
    """README.md's, in which a model and a batch are the reader's own."""
    monkeypatch.chdir(tmp_path)
    model, ids = tiny_llama(), torch.randint(0, 90, (2, 7))
    given = {"model": model, "fresh_model": copy.deepcopy(model), "ids": ids, "labels": ids}
    example = next(block for kind, block in BLOCK.findall((ROOT / "README.md").read_text()) if kind == "python")
    exec(compile(example, "README.md", "exec"), given)
    assert "lora_linear" in capsys.readouterr().out and (tmp_path / "graph.html").exists()
    assert given["base"] is given["fresh_model"]


@pytest.mark.parametrize(
    "page",
    ["README", "trl", "classifier", "vision", "custom-model", "training-loop", "multi-gpu", "serving", "debugging"],
)
def test_the_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch, capfd, as_shipped):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    follow(ROOT / f"docs/{page}.md", capfd)
