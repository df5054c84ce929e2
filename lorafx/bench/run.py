"""Run a case: contestants are set up, warmed up and checked one by one, then take turns in random order to be timed.

A contestant that fails has a row that says why.
"""

from __future__ import annotations

import copy
import gc
import os
import random
from collections.abc import Callable

import torch
from torch import nn

from .cases import Case
from .contestants import Maker, Missing, first_line, with_peft
from .measure import Outcome, Runner, differences, keep_freed_memory, peak, runner, seconds
from .models import Batch, batch_of, build
from .record import Result, Row

WARM_UP = {"cpu": 3, "cuda": 10}
EXACT_BELOW, EXACT_UP_TO = 400e6, 4096  # parameters of a base that is also run in float64, and tokens of a sequence
# The largest relative differences of outputs and gradients that rounding explains; those of a wrong one are about 1.
OUTPUTS_OFF = {"float32": 1e-5, "bfloat16": 3e-2}
GRADIENTS_OFF = {"float32": 1e-4, "bfloat16": 2e-1}

Tell = Callable[[str], object]


def run(case: Case, names: list[str], makers: dict[str, Maker], device: str, rounds: int, tell: Tell) -> Result:
    """Run one case: a row for each of the contestants named, timed in so many rounds; `tell` is told the progress."""
    torch.compiler.reset()
    keep_freed_memory()
    base = build(case, device)
    batch = batch_of(case, base)
    tell("reference")
    try:
        expected, reference = _expected(case, base, batch)
    except Exception as error:  # on a device that is too small, say
        expected, reference = None, f"nothing, for PEFT failed: {first_line(error)}"
    rows = {name: Row(name) for name in names}
    runners: dict[str, Runner] = {}
    for name, row in rows.items():
        tell(name)
        try:
            runners[name] = _ready(row, makers[name], case, base, batch, expected)
        except Exception as error:
            row.failed = str(error) if isinstance(error, Missing) else first_line(error)
        _tidy()
    _take_turns(rows, runners, device, min(case.rounds or rounds, rounds), tell)
    return Result(case, list(rows.values()), reference, os.getloadavg()[0])


def _expected(case: Case, base: nn.Module, batch: Batch) -> tuple[Outcome, str]:
    """PEFT's outputs and gradients, in float64 or, for a large case, in its own dtype; and what to call them."""
    exact = sum(p.numel() for p in base.parameters()) < EXACT_BELOW and case.sequence <= EXACT_UP_TO
    if exact:
        base, batch = copy.deepcopy(base).double(), batch.as_dtype(torch.float64)
    outcome = runner(case, with_peft(case, base), batch).outcome()
    _tidy()
    return outcome, f"PEFT in {'float64' if exact else case.dtype}"


def _ready(row: Row, maker: Maker, case: Case, base: nn.Module, batch: Batch, expected: Outcome | None) -> Runner:
    """Set up a contestant, compare its outputs, warm it up and take its peak memory, for `row`."""
    cuda = next(base.parameters()).is_cuda
    ready = runner(case, maker(case, base), batch)
    found = ready.outcome()
    if expected and (case.decode or found.gradients):
        row.output_difference, row.gradient_difference = differences(found, expected)
        row.parity = row.output_difference <= OUTPUTS_OFF[case.dtype]
        row.parity &= (row.gradient_difference or 0.0) <= GRADIENTS_OFF[case.dtype]
    del found
    for _ in range(WARM_UP["cuda" if cuda else "cpu"]):
        ready.step()
    row.held_bytes, row.peak_bytes = ready.held(), peak(ready.step, cuda)
    return ready


def _take_turns(rows: dict[str, Row], runners: dict[str, Runner], device: str, rounds: int, tell: Tell) -> None:
    """Time each contestant once a round, in a random order."""
    rng = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            tell(f"round {number + 1} of {rounds}")
            for name in rng.sample(sorted(runners), len(runners)):
                try:
                    rows[name].seconds.append(seconds(runners[name].step, device == "cuda"))
                except Exception as error:
                    rows[name].failed = first_line(error)
                    del runners[name]
            gc.collect()
    finally:
        gc.enable()


def _tidy() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
