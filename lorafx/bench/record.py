"""The record: what was measured, where, and with which versions; as JSON, and with the ratios for tables and bars."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import statistics
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .cases import Bar, Case

MIB = 2**20
LIBRARIES = ("torch", "transformers", "peft", "liger_kernel", "unsloth", "triton")


@dataclass
class Row:
    """One contestant in one case; `failed` says why there are no figures.

    Differences are relative to the reference's outputs and gradients; `parity` says whether rounding explains them.
    """

    contestant: str
    seconds: list[float] = field(default_factory=list)  # by round
    peak_bytes: int = 0  # of a step, above what is held
    held_bytes: int = 0  # weights, adapters and the optimizer's state
    setup: float = 0.0  # seconds until it was made, compiled, compared and warm
    warm: float = 0.0  # seconds of the last step before the clock ran: all there is of a run that is cut short
    apart: bool = False  # in a process of its own, by itself
    output_difference: float | None = None
    gradient_difference: float | None = None
    parity: bool | None = None  # None: it has no adapter, so there is nothing to agree with
    failed: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def total_bytes(self) -> int:
        return self.peak_bytes + self.held_bytes


@dataclass
class Result:
    """One case: its rows, in the order they were asked for. While it runs, some have no times yet."""

    case: Case
    rows: list[Row]
    reference: str = ""  # what outputs and gradients were compared with
    load: float = 0.0  # the machine's load average: well above `threads`, something else was using it
    took: float = 0.0  # seconds for all of the case

    def measured(self, pattern: str) -> list[Row]:
        return [row for row in self.rows if row.seconds and not row.failed and fnmatchcase(row.contestant, pattern)]

    def judged(self, bar: Bar) -> float | None:
        """The ratio that a bar limits: best contestant that matches to best reference; None if one is missing."""
        pairs = self.measured(bar.contestant), self.measured(bar.reference)
        if not all(pairs):
            return None
        if bar.of == "peak":
            ours, theirs = (min(row.total_bytes for row in rows) for rows in pairs)
            return ours / theirs
        return ratios(*(min(rows, key=lambda row: row.median) for rows in pairs))[1]


def ratios(row: Row, reference: Row) -> tuple[float, float, float]:
    """Quartiles, over rounds, of the ratio of two contestants' times in a round: lower, median, upper."""
    within = [own / other for own, other in zip(row.seconds, reference.seconds)]
    if len(within) < 2:
        return (within[0],) * 3
    lower, middle, upper = statistics.quantiles(within, n=4, method="inclusive")
    return lower, middle, upper


def environment(device: str) -> dict[str, Any]:
    """Date, machine and versions."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPU cores, {platform.machine()}"
    return {
        "date": datetime.date.today().isoformat(),
        "device": name,
        "threads": torch.get_num_threads(),
        "versions": {library: found for library in LIBRARIES if (found := _version(library))},
    }


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def write_json(results: list[Result], where: dict[str, Any], path: Path) -> None:
    cases = [
        {
            "case": dataclasses.asdict(result.case),
            "reference": result.reference,
            "load": result.load,
            "took": result.took,
            "rows": [dataclasses.asdict(row) for row in result.rows],
            "bars": [dataclasses.asdict(bar) | {"measured": result.judged(bar)} for bar in result.case.bars],
        }
        for result in results
    ]
    path.write_text(json.dumps({"environment": where, "cases": cases}, indent=1))
