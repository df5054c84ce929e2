"""Run a case: contestants are set up, warmed up and checked one by one, then take turns in random order to be timed.

The result is there from the beginning, and is filled in: whoever is told of the progress can keep what is known so far.
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
from .contestants import Maker, first_line
from .job import Job, Tell, set_up_all, take_turns
from .measure import keep_freed_memory
from .models import batch_of, build
from .record import Result, Row
from .reference import reference, tidy


def begun(case: Case, names: list[str], packages: str = "") -> Result:
    """The result of a case that has not run: an empty row for each of the contestants named.

    `packages` is a folder of packages that only those can import who run in a process of their own.
    """
    return Result(
        case, [apart.row(name, case, packages) if name in apart.FIRST_IMPORT else Row(name) for name in names]
    )


def run(result: Result, makers: dict[str, Maker], device: str, rounds: int, tell: Tell, packages: str = "") -> None:
    """Run a case whose result has `begun`, timed in so many rounds; `tell` is told the progress.

    What ends the whole case, as a base for which there is no memory, is the reason that its rows give; other cases can
    go on.
    """
    torch.compiler.reset()
    keep_freed_memory()
    began = time.perf_counter()
    try:
        _run(result, makers, device, min(result.case.rounds or rounds, rounds), tell, packages)
    except Exception as error:
        reason = first_line(error)
        for row in result.rows:
            row.failed = row.failed or ("" if row.seconds else reason)
        tell(f"ended by {reason}")
    tidy()
    result.took = time.perf_counter() - began


def _run(result: Result, makers: dict[str, Maker], device: str, rounds: int, tell: Tell, packages: str) -> None:
    here = {row.contestant: row for row in result.rows if not row.apart}
    own = [row for row in result.rows if row.apart and not row.failed]
    with tempfile.TemporaryDirectory() as folder:
        job = _job(result.case, device, rounds, tell)
        result.reference = job.expected.by
        runners = set_up_all(job, here, makers, tell)
        take_turns(job, here, runners, tell)
        result.load = os.getloadavg()[0]
        if own:
            apart.save(job, Path(folder))
        del job, runners
        tidy()
        for row in own:
            tell(f"{row.contestant}, in a process of its own")
            result.rows[result.rows.index(row)] = apart.run(row.contestant, Path(folder), packages)


def _job(case: Case, device: str, rounds: int, tell: Tell) -> Job:
    began, base = time.perf_counter(), build(case, device)
    batch = batch_of(case, base)
    tell("reference")
    return Job(case, base, batch, reference(case, base, batch), device, rounds, began)
