"""Text: one place of a call's graph, as captured, pass by pass, and as it is now."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..errors import SelectionError
from ..tables import InNotebooks, table
from .history import History, Line, Part, Stage, changes, innermost

_WIDTH = 100  # of the column of what is computed; shapes stand next to it


@dataclass(frozen=True, repr=False)
class View(InNotebooks):
    """What `show` returns: text, to print."""

    text: str

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__


def view(history: History, name: str | None = None) -> View:
    """The text about a module or a site, a layer, a pass, or (None) the whole call.

    Raises `SelectionError` for a name of none of these, with the nearest that there are.
    """
    if name is None:
        return View(_call(history))
    if any(_of_pass(stage, name) for _, stage in history):
        return View("\n\n".join(_pass(before, after) for before, after in history if _of_pass(after, name)))
    found = innermost(history.last.parts, name) or innermost(history.first.parts, name)
    if found is None:
        raise SelectionError(f"this call has no pass, module or site called {name!r}; {_nearest(history, name)}")
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
        old, new = (_code(each.lines) if each else [] for each in (earlier, part))
        marked = list(difflib.unified_diff(old, new, n=1, lineterm=""))[2:]
        if marked:
            texts += [f"{part.title}{_run_by(part)}:", *("  …" if line[:2] == "@@" else f"  {line}" for line in marked)]
    return "\n".join(texts if len(texts) > 1 else [f"{after.name} changed nothing"])


def _module(history: History, name: str, part: Part, path: str) -> str:
    """A module's lines as captured, what each pass did to them, and as they are now with what is around them."""
    texts = [f"{name}{f', in {part.title}' if part.layers[0] else ''}{_run_by(part)}"]
    first = _outline(history.first, name)
    texts += ["", history.first.name, *first] if first else []
    for before, after in history:
        gone, come = changes(_own(before, name), _own(after, name))
        if gone or come:
            texts += ["", after.name]
            texts += [f"  - {line}" for line in _code(gone)] + [f"  + {line}" for line in _code(come)]
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
    marks = [" " if line in own else "·" for line in around]
    return [f"  {mark} {maker:<{width}}  {code}" for mark, maker, code in zip(marks, makers, _code(around))]


def _code(lines: Sequence[Line]) -> list[str]:
    """Lines as text: what is computed, then its shape and dtype in columns of their own."""
    codes = [f"return {line.code}" if line.name == "return" else f"{line.name} = {line.code}" for line in lines]
    width = min(max(map(len, codes), default=0), _WIDTH)
    return [f"{code:<{width}}  {line.shape} {line.dtype}".rstrip() for code, line in zip(codes, lines)]


def _run_by(part: Part) -> str:
    return f", run by {_layers(part)}" if part.layers and part.layers[0] else ""


def _layers(part: Part) -> str:
    first, *others = part.layers or ("",)
    return f"{first} … {others[-1]} ({len(part.layers)} layers)" if len(others) > 1 else ", ".join([first, *others])


def _nearest(history: History, name: str) -> str:
    known = {each.rpartition(".")[2]: each for each in reversed([*_names(history)])}
    near = difflib.get_close_matches(name.rpartition(".")[2], known, n=3, cutoff=0.5) or [*known][:3]
    return f"nearest: {', '.join(known[each] for each in near)}"


def _names(history: History) -> Iterator[str]:
    yield from (stage.name.partition("{")[0] for stage in history.stages[1:])
    for part in history.last.parts:
        yield from (layer for layer in part.layers if layer)
        yield from _modules(part)


def _modules(part: Part) -> Iterable[str]:
    prefix = f"{part.layers[0]}." if part.layers and part.layers[0] else ""
    return (f"{prefix}{line.module}" for line in part.lines if line.module)
