"""A job: what all contestants of a case are given, and how they are set up, checked and timed."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from .cases import Case
from .contestants import COARSER, ONE_ADAPTER, Maker, Missing, first_line
from .measure import Runner, differences, peak, pools, runner, seconds
from .models import Batch
from .record import MIB, Row
from .reference import Reference, tidy

WARM_UP = {"cpu": 3, "cuda": 10}

Tell = Callable[[str], object]


@dataclass(frozen=True)
class Job:
    """A case, its frozen base and batch on a device, what is expected of everybody, and how often to take the time."""

    case: Case
    base: nn.Module
    batch: Batch
    expected: Reference
    device: str
    rounds: int
    began: float = field(default_factory=time.perf_counter)


def set_up(job: Job, row: Row, maker: Maker) -> Runner:
    """Set up a contestant, compare its outputs, warm it up and take its peak memory, for `row`."""
    case, cuda, began = job.case, job.device == "cuda", time.perf_counter()
    before = pools(cuda)
    made = runner(case, maker(case, job.base), job.batch)
    found, expected = made.outcome(), job.expected
    if expected.outcome and (found.gradients.keys() == expected.outcome.gradients.keys()):
        row.output_difference, row.gradient_difference = differences(found, expected.outcome)
        near = row.output_difference <= expected.outputs_off
        near &= (row.gradient_difference or 0.0) <= expected.gradients_off
        other = row.contestant in COARSER or (case.adapters > 1 and row.contestant in ONE_ADAPTER)
        row.parity = None if other else near
    del found
    for _ in range(case.warm_up or WARM_UP[job.device]):
        row.warm = seconds(made.step, cuda)
    row.held_bytes, row.peak_bytes = made.held(), peak(made.step, cuda) + pools(cuda) - before
    row.setup = time.perf_counter() - began
    return made


def set_up_all(job: Job, rows: dict[str, Row], makers: dict[str, Maker], tell: Tell) -> dict[str, Runner]:
    """Set up those of the rows, one by one, until the case's budget is spent; who fails has a row that says why."""
    runners: dict[str, Runner] = {}
    for name, row in rows.items():
        if job.case.budget and time.perf_counter() - job.began > job.case.budget:
            row.failed = f"left out: the case's {job.case.budget} s were over"
            continue
        tell(name)
        try:
            runners[name] = set_up(job, row, makers[name])
        except Exception as error:
            row.failed = str(error) if isinstance(error, Missing) else first_line(error)
        tell(f"{name}: {row.failed or _first_figures(row)}")
        tidy()
    return runners


def _first_figures(row: Row) -> str:
    return f"ready after {row.setup:.1f} s, {row.warm * 1e3:,.1f} ms a step, {row.total_bytes / MIB:,.0f} MiB"


def take_turns(job: Job, rows: dict[str, Row], runners: dict[str, Runner], tell: Tell) -> None:
    """Time each contestant once a round, in a random order."""
    rng = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for number in range(job.rounds):
            tell(f"round {number + 1} of {job.rounds}")
            for name in rng.sample(sorted(runners), len(runners)):
                try:
                    rows[name].seconds.append(seconds(runners[name].step, job.device == "cuda"))
                except Exception as error:
                    rows[name].failed = first_line(error)
                    del runners[name]
            gc.collect()
    finally:
        gc.enable()
