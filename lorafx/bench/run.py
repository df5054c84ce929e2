"""Run a case: contestants are set up, warmed up and checked one by one, then take turns in random order to be timed.

Who needs a process of its own is timed by itself after the others, when these have given back what they hold.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import torch

from . import apart
from .cases import Case
from .contestants import Maker
from .job import Job, Tell, set_up_all, take_turns
from .measure import keep_freed_memory
from .models import batch_of, build
from .record import Result, Row
from .reference import reference, tidy


def run(
    case: Case, names: list[str], makers: dict[str, Maker], device: str, rounds: int, tell: Tell, packages: str = ""
) -> Result:
    """Run one case: a row for each of the contestants named, timed in so many rounds; `tell` is told the progress.

    `packages` is a folder of packages that only those can import who run in a process of their own.
    """
    torch.compiler.reset()
    keep_freed_memory()
    began = time.perf_counter()
    rows = {name: apart.row(name, case, packages) if name in apart.FIRST_IMPORT else Row(name) for name in names}
    here = {name: row for name, row in rows.items() if not row.apart}
    own = [name for name, row in rows.items() if row.apart and not row.failed]
    with tempfile.TemporaryDirectory() as folder:
        job = _job(case, device, min(case.rounds or rounds, rounds), tell)
        runners = set_up_all(job, here, makers, tell)
        take_turns(job, here, runners, tell)
        load, by = os.getloadavg()[0], job.expected.by
        if own:
            apart.save(job, Path(folder))
        del job, runners
        tidy()
        for name in own:
            tell(f"{name}, in a process of its own")
            rows[name] = apart.run(name, Path(folder), packages)
    return Result(case, list(rows.values()), by, load, time.perf_counter() - began)


def _job(case: Case, device: str, rounds: int, tell: Tell) -> Job:
    began, base = time.perf_counter(), build(case, device)
    batch = batch_of(case, base)
    tell("reference")
    return Job(case, base, batch, reference(case, base, batch), device, rounds, began)
