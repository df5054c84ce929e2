"""Commands: what `lorafx` and `python -m lorafx` do, one file each.

In come words from a shell; out go text or JSON on standard output, all else on standard error, and an exit status: 0
where all is well, 1 where something was refused or found wrong, 2 for words that no command takes.
"""

from __future__ import annotations

import ast
import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import typer

# In the order in which help lists them. A command's module is imported when it is asked for: that may take seconds.
NAMES = ("show", "check", "info", "merge", "convert", "bench")


def run(words: Sequence[str]) -> int:
    """Run the command that these words ask for; returns the exit status."""
    try:
        _app(words)(list(words), prog_name="lorafx")
    except SystemExit as done:
        return int(done.code or 0)
    return 0


def _app(words: Sequence[str]) -> typer.Typer:
    app = typer.Typer(help="LoRA by graph rewriting.", no_args_is_help=True, add_completion=False)
    for name in NAMES:
        app.command(name)(_command(name) if name in words else _described(name))
    app.callback()(lambda: None)  # so that one command alone keeps its name
    return app


def _command(name: str) -> Callable[..., None]:
    try:
        function = getattr(importlib.import_module(f".{name}", __package__), name)
    except ModuleNotFoundError as missing:
        return _lacking(f"{name} needs {missing.name}: pip install 'lorafx[{name}]'")

    @functools.wraps(function)
    def exits(*args: object, **kwargs: object) -> None:
        raise typer.Exit(function(*args, **kwargs))

    return exits


def _described(name: str) -> Callable[..., None]:
    """A command as the list of all shows it: by its docstring."""
    parsed = ast.parse(Path(__file__).with_name(f"{name}.py").read_text("utf-8"))
    function = next(each for each in parsed.body if isinstance(each, ast.FunctionDef) and each.name == name)

    def described() -> None:
        raise AssertionError("it is imported when it is asked for")

    described.__doc__ = ast.get_docstring(function)
    return described


def _lacking(what: str) -> Callable[..., None]:
    def refuses() -> None:
        print(what, file=sys.stderr)
        raise typer.Exit(2)

    refuses.__doc__ = f"({what})"
    return refuses
