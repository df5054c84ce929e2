"""The report: Markdown tables for people, and a chart where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .contestants import WITHOUT
from .record import MIB, Result, Row, ratios

BARS = ("case", "ratio", "measured", "at most", "held")


def markdown(results: list[Result], where: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    parts = [f"{where['date']}, {where['device']}, {where['threads']} threads; {versions}."]
    for result in results:
        about = f"{result.case}. Compared with {result.reference}. Load average {result.load:.1f}. "
        about += f"In all {result.took:.0f} s" + f", of {result.case.budget} for set-ups." * bool(result.case.budget)
        parts += [f"### {result.case.name}", about, rows(result)]
    if judged := bars(results):
        parts += ["### Bars", _table(BARS, judged)]
    return "\n\n".join(parts) + "\n"


def bars(results: list[Result]) -> list[tuple[str, ...]]:
    """A row for each bar, with the columns `BARS`."""
    return [
        (
            result.case.name,
            f"{bar.contestant} / {bar.reference}, {bar.of}",
            "unmeasured" if ratio is None else f"{ratio:.3f}",
            f"{bar.limit:.3f}",
            "" if ratio is None else "yes" if ratio <= bar.limit else "no",
        )
        for result in results
        for bar in result.case.bars
        for ratio in (result.judged(bar),)
    ]


def rows(result: Result) -> str:
    """The table of a case."""
    references = _references(result)
    columns = ("contestant", "median ms", "tokens/s", *(f"to {name}" for name in references))
    columns += ("peak MiB", "of it held", "output off by", "gradients off by", "set-up s")
    return _table(columns, [_cells(result, row, references) for row in result.rows])


def _references(result: Result) -> list[str]:
    """The case's references that ran; also lorafx if a contestant leaves out one of its passes."""
    extra = ("lorafx",) if any(row.contestant.startswith(WITHOUT) for row in result.rows) else ()
    return [name for name in (*result.case.references, *extra) if result.measured(name)]


def _cells(result: Result, row: Row, references: Sequence[str]) -> list[str]:
    name = row.contestant + " (own process)" * row.apart
    if row.failed or not row.seconds:
        return [name, row.failed or "not timed", *[""] * (len(references) + 6)]
    cells = [name, f"{row.median * 1e3:,.1f}", f"{result.case.tokens / row.median:,.0f}"]
    for reference in references:
        lower, middle, upper = ratios(row, result.measured(reference)[0])
        cells.append(f"{middle:.3f} ({lower:.3f} to {upper:.3f})")
    cells += [f"{row.total_bytes / MIB:,.0f}", f"{row.held_bytes / MIB:,.0f}"]
    mark = " **too much**" if row.parity is False else ""
    return [*cells, _off(row.output_difference), _off(row.gradient_difference) + mark, f"{row.setup:.1f}"]


def _off(difference: float | None) -> str:
    return "" if difference is None else f"{difference:.1e}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


def draw(results: list[Result], path: Path) -> bool:
    """Draw each contestant's time relative to the first reference, with quartiles; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    drawn = [(result, names) for result in results if (names := _references(result))]
    figure = Figure(figsize=(8, 1 + sum(0.6 + 0.3 * len(result.rows) for result, _ in drawn)), layout="constrained")
    heights = [1 + len(result.rows) for result, _ in drawn]
    axes = figure.subplots(max(len(drawn), 1), squeeze=False, height_ratios=heights or None)[:, 0]
    for axis, (result, (reference, *_)) in zip(axes, drawn):
        measured = result.measured("*")[::-1]
        quartiles = [ratios(row, result.measured(reference)[0]) for row in measured]
        middles = [middle for _, middle, _ in quartiles]
        spread = [[m - low for low, m, _ in quartiles], [high - m for _, m, high in quartiles]]
        axis.barh(
            [row.contestant for row in measured], middles, xerr=spread, color="#7a9cc6", ecolor="#333333", height=0.7
        )
        axis.axvline(1, color="#333333", linewidth=0.8)
        axis.set_title(f"{result.case.name}: time / {reference}", fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
    figure.savefig(path, dpi=120)
    return True
