"""Text: one place of a call's graph, as captured, pass by pass, and as it is now."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import SelectionError, nearest
from ..tables import InNotebooks, table, width_of_terminal
from .history import History, Line, Part, Stage, changes, innermost

_CODE = 80  # the width of the column of what is computed, on a terminal that has room for it
_SHAPES = 34  # what marks, shapes and dtypes take next to it


@dataclass(frozen=True, repr=False)
class View(InNotebooks):
    """What `show` returns: text, to print."""

    text: str

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__


def view(history: History, name: str | None = None) -> View:
    """The text about a module or a site, a layer, a block, a pass, or (None) the whole call.

    Raises `SelectionError` for a name of none of these, with the nearest that there are.
    """
    if name is None:
        return View(_call(history))
    if any(_of_pass(stage, name) for _, stage in history):
        return View("\n\n".join(_pass(before, after) for before, after in history if _of_pass(after, name)))
    part = history.last.part(name)
    if part and part.layers:
        name = part.layers[0]
    found = innermost(history.last.parts, name) or innermost(history.first.parts, name)
    if found is None:
        near = nearest(name, _names(history), "show() lists the passes and graphs")
        raise SelectionError(f"this call has no pass, module or site called {name!r}; {near}")
    return View(_module(history, name, *found))


def _of_pass(stage: Stage, name: str) -> bool:
    return name in (stage.name, stage.name.partition("{")[0])


def _call(history: History) -> str:
    """Which pass wrote how much, and what graphs there are."""
    written = []
    for before, after in history:
        gone, come = (sum(map(len, lines)) for lines in zip(*_changes(before, after)))
        if gone or come:
            written.append((after.name, gone, come))
    parts = [(part.title, _layers(part), len(part.lines)) for part in history.last.parts]
    hint = "show(name) tells of a pass, a layer, a module or a site; show(html=path) writes a page of all of it"
    passes = table("passes that changed something", ("pass", "lines removed", "lines written"), written)
    return "\n".join([passes, table("graphs", ("graph", "run by", "lines"), parts), hint])


def _changes(before: Stage, after: Stage) -> list[tuple[list[Line], list[Line]]]:
    earlier = {part.title: part.lines for part in before.parts}
    return [changes(earlier.get(part.title, ()), part.lines) for part in after.parts]


def _pass(before: Stage, after: Stage) -> str:
    """What one pass did, graph by graph, with a line before and after each change."""
    texts = [after.name]
    for part in after.parts:
        earlier = before.part(part.title)
        hunks = list(_hunks(earlier.lines if earlier else (), part.lines))
        if hunks:
            texts += [f"{part.title}{_run_by(part)}:", *hunks]
    return "\n".join(texts if len(texts) > 1 else [f"{after.name} changed nothing"])


def _hunks(old: Sequence[Line], new: Sequence[Line]) -> Iterator[str]:
    """Each place in which two listings differ, marked, with a line around it."""
    before, after = ([line.text for line in lines] for lines in (old, new))
    for hunk in difflib.SequenceMatcher(None, before, after, autojunk=False).get_grouped_opcodes(1):
        marked: list[tuple[str, Line]] = []
        for tag, i1, i2, j1, j2 in hunk:
            marked += [("  " if tag == "equal" else "- ", line) for line in old[i1:i2]]
            marked += [("+ ", line) for line in new[j1:j2] if tag != "equal"]
        yield "  …"
        yield from _listing(marked)


def _module(history: History, name: str, part: Part, path: str) -> str:
    """A module's lines as captured, what each pass did to them, and as they are now with what is around them."""
    texts = [f"{name}{f', in {part.title}' if part.layers[0] else ''}{_run_by(part)}"]
    first = _outline(history.first, name)
    texts += ["", history.first.name, *first] if first else []
    for before, after in history:
        gone, come = changes(_own(before, name), _own(after, name))
        if gone or come:
            texts += ["", after.name, *_listing([*(("- ", line) for line in gone), *(("+ ", line) for line in come)])]
    return "\n".join([*texts, "", "now", *_outline(history.last, name)])


def _own(stage: Stage, name: str) -> tuple[Line, ...]:
    found = innermost(stage.parts, name)
    return found[0].of_module(found[1]) if found else ()


def _outline(stage: Stage, name: str) -> list[str]:
    """A module's lines with those that give it something and those that use what it gives, and who wrote each."""
    found = innermost(stage.parts, name)
    if found is None:
        return []
    part, path = found
    own = part.of_module(path)
    names, read = {line.name for line in own}, {each for line in own for each in line.inputs}
    around = [line for line in part.lines if line in own or line.name in read or names & {*line.inputs}]
    makers = [line.made_by or "the model" for line in around]
    width = max(map(len, makers), default=0)
    marks = [f"{' ' if line in own else '·'} {maker:<{width}}  " for line, maker in zip(around, makers)]
    return list(_listing(list(zip(marks, around))))


def _listing(marked: Sequence[tuple[str, Line]]) -> Iterator[str]:
    """Lines after their marks: what is computed, folded where it is long, then its shape and dtype in a column."""
    room = max(min(_CODE, width_of_terminal() - _SHAPES), _CODE // 2)
    codes = [
        _folded(f"return {line.code}" if line.name == "return" else f"{line.name} = {line.code}", room)
        for _, line in marked
    ]
    width = max((len(code) for folds in codes for code in folds), default=0)
    for (mark, line), (code, *folds) in zip(marked, codes):
        yield f"  {mark}{code:<{width}}  {line.shape} {line.dtype}".rstrip()
        yield from (f"  {'':<{len(mark)}}{fold}" for fold in folds)


def _folded(code: str, room: int) -> list[str]:
    return textwrap.wrap(code, room, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def _run_by(part: Part) -> str:
    return f", run by {_layers(part)}" if part.layers and part.layers[0] else ""


def _layers(part: Part) -> str:
    first, *others = part.layers or ("",)
    return f"{first} … {others[-1]} ({len(part.layers)} layers)" if len(others) > 1 else ", ".join([first, *others])


def _names(history: History) -> Iterator[str]:
    yield from (stage.name.partition("{")[0] for stage in history.stages[1:])
    for part in history.last.parts:
        places = dict.fromkeys(place for line in part.lines for place in (line.module, line.site) if place)
        for layer in part.layers:
            yield from filter(None, (layer, *(f"{layer}.{place}".lstrip(".") for place in places)))
