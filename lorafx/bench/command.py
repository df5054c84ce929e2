"""The command line: chooses cases and contestants, runs them, and writes the results."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterable
from dataclasses import replace
from fnmatch import filter as matching
from functools import partial
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

import lorafx

from ..errors import PipelineError
from ..tables import table
from ..torch_private.compilers import dynamo
from .cases import QUICK, SMOKE, Case, of_device
from .contestants import MAKERS, Maker, of_case, without
from .record import Result, environment, write_json
from .report import BARS, bars, draw, markdown
from .run import run as run_case


class Unknown(Exception):
    """A name or pattern that matches nothing."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--list", action="store_true", help="print the cases of the device, and who runs them")
    parser.add_argument("--quick-gpu", action="store_true", help="what matters most on a GPU, in about four minutes")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="names or patterns; default: all but smoke*")
    parser.add_argument("--contestants", nargs="+", metavar="NAME", help="names or patterns; default: the case's own")
    parser.add_argument("--without", default="", metavar="PASS[,PASS]", help="add lorafx, eager, without each of these")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--packages", default="", help="a folder that only contestants in an own process import from")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder of bench.json, bench.md, bench.png")


def main(asked: argparse.Namespace) -> int:
    """Exit status. 0: done. 1: a contestant's outputs or gradients are wrong. 2: a name that matches nothing."""
    try:
        cases = _cases(asked)
        extra = dict(map(without, filter(None, asked.without.split(","))))
        plans = [(case, _names(case, asked.contestants, tuple(extra))) for case in cases]
    except (Unknown, PipelineError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if asked.list:
        print(table(asked.device, ("case", "contestants", "what"), [(c.name, " ".join(n), c) for c, n in plans]))
        return 0
    warnings.simplefilter("ignore")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler, which counts memory, prints a line at each use
    transformers.utils.logging.set_verbosity_error()
    dynamo.recompile_limit = 64  # above the limit a compiled contestant would run eagerly without a word
    results = _run(plans, MAKERS | extra, asked)
    if judged := bars(results):
        print(table(f"Bars; all else is in {asked.out}", BARS, judged))
    off = [f"{r.case.name}: {row.contestant}" for r in results for row in r.rows if row.parity is False]
    if off:
        print(f"bench: outputs or gradients off by more than rounding: {', '.join(off)}", file=sys.stderr)
    return int(bool(off))


def _cases(asked: argparse.Namespace) -> list[Case]:
    usual = QUICK if asked.quick_gpu else of_device(asked.device)
    known = {case.name: case for case in usual + SMOKE}
    if not asked.cases:
        return [*usual, *SMOKE] if asked.list else list(usual)
    return [known[name] for name in _matching(known, asked.cases, "case")]


def _names(case: Case, patterns: list[str] | None, extra: tuple[str, ...]) -> list[str]:
    """Who runs a case: its own contestants or those asked for, and the `extra` ones that leave out a pass."""
    own = replace(case, contestants=tuple(_matching(MAKERS, patterns, "contestant"))) if patterns else case
    return of_case(own, () if case.decode and not patterns else extra)


def _matching(known: Iterable[str], patterns: list[str], what: str) -> list[str]:
    found: dict[str, None] = {}
    for pattern in patterns:
        names = matching(known, pattern)
        if not names:
            raise Unknown(f"no {what} named {pattern!r}; there are {', '.join(known)}")
        found |= dict.fromkeys(names)
    return list(found)


def _run(plans: list[tuple[Case, list[str]]], makers: dict[str, Maker], asked: argparse.Namespace) -> list[Result]:
    results = []
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        for number, (case, names) in enumerate(plans):
            title = f"{case.name} ({number + 1} of {len(plans)}{f', {case.budget} s for set-ups' * bool(case.budget)})"
            tell = partial(_tell, progress, task, title)
            results.append(run_case(case, names, makers, asked.device, asked.rounds, tell, asked.packages))
            _write(results, asked)
        draw(results, asked.out / "bench.png")
    return results


def _tell(progress: Progress, task: TaskID, title: str, now: str) -> None:
    """A line that changes on a terminal, and lines with the seconds so far in a log."""
    progress.update(task, description=f"{title}: {now}")
    if not progress.console.is_terminal:
        print(f"{progress.tasks[task].elapsed or 0.0:6.1f} s  {title}: {now}", file=sys.stderr, flush=True)


def _write(results: list[Result], asked: argparse.Namespace) -> None:
    """Write all results so far; called after each case, so that a run that is cut short leaves something."""
    asked.out.mkdir(parents=True, exist_ok=True)
    where = environment(asked.device) | {"lorafx": lorafx.__version__}
    write_json(results, where, asked.out / "bench.json")
    (asked.out / "bench.md").write_text(markdown(results, where))
