"""Tables as plain text, and what prints as such in a notebook."""

from __future__ import annotations

import html
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


class InNotebooks:
    """What prints as text, and is shown in a notebook as that text, in columns."""

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def width_of_terminal() -> int:
    """How many columns there are to print in: the terminal's, or any number in a pipe, a file or a notebook."""
    return shutil.get_terminal_size().columns if sys.stdout is not None and sys.stdout.isatty() else 10_000


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A plain-text table below a title, as wide as the terminal at most; numbers are aligned to the right."""
    cells = [[_text(value) for value in row] for row in rows]
    drawn = Table()
    for index, column in enumerate(columns):
        numeric = bool(cells) and all(_is_number(row[index]) for row in cells)
        drawn.add_column(column, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    for row in cells:
        drawn.add_row(*row)
    console = Console(width=width_of_terminal(), no_color=True)
    with console.capture() as captured:
        console.print(drawn, markup=False)
    return "\n".join([title, *(line.rstrip() for line in captured.get().splitlines())])


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}" if isinstance(value, float) else str(value)


def _is_number(text: str) -> bool:
    return text.replace(",", "").replace(".", "").removesuffix(" %").isdigit()
