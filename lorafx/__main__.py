"""`python -m lorafx`: the commands."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# What each does, and the module that has its options and runs it: imported when it is asked for.
COMMANDS = {
    "bench": ("measure lorafx next to the frozen base and to other libraries", ".bench.command"),
    "merge": ("merge adapters onto a checkpoint on disk, without the model in memory", ".merging.command"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m lorafx", description="LoRA by graph rewriting")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, (purpose, module) in COMMANDS.items():
        own = commands.add_parser(name, help=purpose, description=purpose)
        if name in given[:1]:
            _add(own, name, module)
    asked = parser.parse_args(given)
    return asked.run(asked)


def _add(parser: argparse.ArgumentParser, name: str, module: str) -> None:
    try:
        command = importlib.import_module(module, __package__)
    except ModuleNotFoundError as missing:
        parser.error(f"{name} needs {missing.name}: pip install 'lorafx[{name}]'")
    command.add_options(parser)
    parser.set_defaults(run=command.main)


if __name__ == "__main__":
    sys.exit(main())
