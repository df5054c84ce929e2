"""Page: a history as one HTML file that needs no server and no network.

What the page draws with is in `assets/`: its own script and style, and dagre, which lays out graphs. Lines and parts
that stages share are written once.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Hashable, Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..files.folder import replace_folder
from .heat import Heat
from .history import History, Line, Part, innermost

_ASSETS = files(__package__) / "assets"


def write_page(path: str | Path, title: str, history: History, heats: Iterable[Heat] = (), name: str = "") -> Path:
    """Write the page, opened at the module `name`; returns its path. An existing file is replaced as a whole."""
    content = _content(title, history, heats, name)
    text = _ASSETS.joinpath("page.html").read_text("utf-8")
    for asset in ("page.css", "dagre.min.js", "page.js"):
        text = text.replace(f"/*{asset}*/", _ASSETS.joinpath(asset).read_text("utf-8"))
    path = Path(path)
    replace_folder(path.parent, {path.name: text.replace("/*content*/", _json(content)).encode()})
    return path


def _content(title: str, history: History, heats: Iterable[Heat], name: str) -> dict[str, Any]:
    lines, parts = _Table(), _Table()
    stages = [
        {"name": stage.name, "parts": [parts.number(_part(part, lines)) for part in stage.parts]}
        for stage in history.stages
    ]
    found = innermost(history.last.parts, name) if name else None
    return {
        "title": title,
        "fields": [field.name for field in dataclasses.fields(Line)],
        "lines": [dataclasses.astuple(line) for line in lines.rows],
        "parts": [dict(zip(("title", "layers", "lines"), row)) for row in parts.rows],
        "stages": stages,
        "heats": [dataclasses.asdict(heat) for heat in heats],
        "open": {"part": found[0].title, "module": found[1]} if found else None,
    }


def _part(part: Part, lines: _Table) -> tuple[Any, ...]:
    return part.title, part.layers, tuple(map(lines.number, part.lines))


class _Table:
    """Equal rows are kept once, and known by their number."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}

    def number(self, row: Hashable) -> int:
        return self._numbers.setdefault(row, len(self._numbers))

    @property
    def rows(self) -> list[Any]:
        return list(self._numbers)


def _json(content: dict[str, Any]) -> str:
    """As JSON inside a script element, which a `<` could end; a number that is none is null."""
    return json.dumps(_finite(content), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
