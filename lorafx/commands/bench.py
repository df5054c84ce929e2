"""`lorafx bench`: chooses cases and contestants, runs them, and writes the results."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import filter as matching
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

import lorafx

from ..bench.cases import QUICK, SMOKE, UNMEASURED, Case, of_device
from ..bench.contestants import MAKERS, Maker, of_case
from ..bench.contestants import without as of_without
from ..bench.record import Result, environment, write_json
from ..bench.report import BARS, bars, draw, markdown, rows
from ..bench.run import begun
from ..bench.run import run as run_case
from ..errors import PipelineError
from ..tables import table
from ..torch_private.compilers import recompile_up_to


class Unknown(Exception):
    """A name or pattern that matches nothing."""


@dataclass(frozen=True)
class Asked:
    """What a run of the bench was asked for: the options of `bench`, names and patterns as tuples."""

    device: str
    cases: tuple[str, ...]
    contestants: tuple[str, ...]
    without: tuple[str, ...]
    quick_gpu: bool
    list: bool
    rounds: int
    packages: str
    out: Path


def bench(
    cases: Annotated[list[str] | None, typer.Argument(help="names or patterns; default: all but smoke*")] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option()] = "cuda" if torch.cuda.is_available() else "cpu",
    only_list: Annotated[bool, typer.Option("--list", help="print the device's cases, and who runs them")] = False,
    quick_gpu: Annotated[bool, typer.Option(help="what matters most on a GPU, in about four minutes")] = False,
    contestants: Annotated[str, typer.Option(help="names or patterns, with commas; default: the case's own")] = "",
    without: Annotated[str, typer.Option(help="passes, with commas: add lorafx, eager, without each of these")] = "",
    rounds: Annotated[int, typer.Option()] = 12,
    packages: Annotated[str, typer.Option(help="a folder that only contestants in an own process import from")] = "",
    out: Annotated[Path, typer.Option(help="folder of bench.json, bench.md, bench.png")] = Path("out/bench"),
) -> int:
    """Measure lorafx next to the frozen base and to other libraries.

    Exit status. 0: done. 1: a contestant's outputs or gradients are wrong. 2: a name that matches nothing.
    Example: lorafx bench train-fp32 'decode*' --contestants base,peft,lorafx
    """
    names, left_out = (tuple(filter(None, text.split(","))) for text in (contestants, without))
    return _bench(Asked(device, tuple(cases or ()), names, left_out, quick_gpu, only_list, rounds, packages, out))


def _bench(asked: Asked) -> int:
    try:
        cases = _cases(asked)
        extra = dict(map(of_without, asked.without))
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
    recompile_up_to(64)  # above the limit a compiled contestant would run eagerly without a word
    results = _run(plans, MAKERS | extra, asked)
    if judged := bars(results):
        print(table(f"Bars; all else is in {asked.out}", BARS, judged))
    off = [f"{r.case.name}: {row.contestant}" for r in results for row in r.rows if row.parity is False]
    if off:
        print(f"bench: outputs or gradients off by more than rounding: {', '.join(off)}", file=sys.stderr)
    return int(bool(off))


def _cases(asked: Asked) -> list[Case]:
    usual = QUICK if asked.quick_gpu else of_device(asked.device)
    known = {case.name: case for case in usual + UNMEASURED * asked.quick_gpu + SMOKE}
    if not asked.cases:
        return list(known.values()) if asked.list else list(usual)
    return [known[name] for name in _matching(known, asked.cases, "case")]


def _names(case: Case, patterns: Sequence[str], extra: tuple[str, ...]) -> list[str]:
    """Who runs a case: its own contestants or those asked for, and the `extra` ones that leave out a pass."""
    own = replace(case, contestants=tuple(_matching(MAKERS, patterns, "contestant"))) if patterns else case
    return of_case(own, () if case.decode and not patterns else extra)


def _matching(known: Iterable[str], patterns: Sequence[str], what: str) -> list[str]:
    found: dict[str, None] = {}
    for pattern in patterns:
        names = matching(known, pattern)
        if not names:
            raise Unknown(f"no {what} named {pattern!r}; there are {', '.join(known)}")
        found |= dict.fromkeys(names)
    return list(found)


def _run(plans: list[tuple[Case, list[str]]], makers: dict[str, Maker], asked: Asked) -> list[Result]:
    results: list[Result] = []
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        for number, (case, names) in enumerate(plans):
            title = f"{case.name} ({number + 1} of {len(plans)}{f', {case.budget} s for set-ups' * bool(case.budget)})"
            results.append(begun(case, names, asked.packages))
            tell = partial(_tell, progress, task, title, lambda: _write(results, asked))
            run_case(results[-1], makers, asked.device, asked.rounds, tell, asked.packages)
            print(f"{case.name}\n{rows(results[-1])}", flush=True)
            _write(results, asked)
        draw(results, asked.out / "bench.png")
    return results


def _tell(progress: Progress, task: TaskID, title: str, write: Callable[[], None], now: str) -> None:
    """A line that changes on a terminal, and lines with the seconds so far in a log; what is known is written down."""
    write()
    progress.update(task, description=f"{title}: {now}")
    if not progress.console.is_terminal:
        print(f"{progress.tasks[task].elapsed or 0.0:6.1f} s  {title}: {now}", file=sys.stderr, flush=True)


def _write(results: list[Result], asked: Asked) -> None:
    """Write all results so far; called after each step of a case, so that a run that is cut short leaves something."""
    asked.out.mkdir(parents=True, exist_ok=True)
    where = environment(asked.device) | {"lorafx": lorafx.__version__}
    write_json(results, where, asked.out / "bench.json")
    (asked.out / "bench.md").write_text(markdown(results, where))
