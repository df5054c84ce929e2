"""Apart: contestants that run in a process of their own, since importing their library changes others' libraries.

save        base, tokenizer, batch and what is expected, to a folder
run         start a process on that folder, and read the row that it leaves there
main        that process: it imports the library first, so that it finds nothing imported before it, then sets
            itself up, is checked, and takes its time as all do, but by itself
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from .cases import Case
from .contestants import MAKERS
from .job import Job, set_up_all, take_turns
from .measure import keep_freed_memory
from .record import Row

FIRST_IMPORT = {"unsloth": "unsloth"}  # the contestants, and what their processes import before anything else
LONGEST = 300  # seconds
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "UNSLOTH_DISABLE_STATISTICS")


def row(name: str, case: Case, packages: str) -> Row:
    """An empty row, or one that says why a contestant cannot run on a case by itself."""
    found = Row(name, apart=True)
    if case.part != "model":
        found.failed = "runs in a process of its own, on whole models alone"
    elif PathFinder.find_spec(FIRST_IMPORT[name], _path(packages)) is None:
        found.failed = f"not importable: {FIRST_IMPORT[name]}"
    return found


def save(job: Job, folder: Path) -> None:
    """Write a job to an empty folder."""
    base: Any = job.base
    base.save_pretrained(folder / "base")
    _tokenizer().save_pretrained(folder / "base")
    torch.save(replace(job, base=None), folder / "job.pt")  # type: ignore[arg-type]


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Nobody reads text here, but some libraries load no model without one."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    words = {token: number for number, token in enumerate(special.values())}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special)


def run(name: str, folder: Path, packages: str) -> Row:
    """The row of a contestant that runs by itself on a saved job.

    If it fails, what its process wrote last says why.
    """
    first = FIRST_IMPORT[name]
    source = f"import {first}; from lorafx.bench.apart import main; main({str(folder)!r}, {name!r})"
    try:
        done = subprocess.run(
            [sys.executable, "-c", source],
            env=_environment(folder, packages),
            capture_output=True,
            text=True,
            timeout=LONGEST,
        )
    except subprocess.TimeoutExpired:
        return Row(name, apart=True, failed=f"not done after {LONGEST} s")
    written = folder / f"{name}.json"
    if done.returncode or not written.exists():
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return Row(name, apart=True, failed=said[-1][:200])
    return Row(**json.loads(written.read_text()))


def _environment(folder: Path, packages: str) -> dict[str, str]:
    """No access to the Hub, this process's own path behind `packages`, and what a library generates in the folder."""
    own = {"PYTHONPATH": os.pathsep.join(_path(packages)), "UNSLOTH_COMPILE_LOCATION": str(folder / "compiled")}
    return os.environ | dict.fromkeys(_OFFLINE, "1") | own


def _path(packages: str) -> list[str]:
    return [each for each in (packages, *sys.path) if each]


def main(folder: str, name: str) -> None:
    """Run a contestant on a saved job and write its row beside it."""
    keep_freed_memory()
    saved: Job = torch.load(Path(folder) / "job.pt", weights_only=False)
    dtype = getattr(torch, saved.case.dtype)
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "base", dtype=dtype)
    base = base.to(saved.device).train().requires_grad_(False)
    job = replace(saved, base=base, began=time.perf_counter())
    del base
    rows = {name: Row(name, apart=True)}
    runners = set_up_all(job, rows, MAKERS, lambda now: None)
    job = replace(job, base=None)  # type: ignore[arg-type]
    take_turns(job, rows, runners, lambda now: None)
    (Path(folder) / f"{name}.json").write_text(json.dumps(asdict(rows[name])))
