"""`python -m lorafx`: the commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lorafx", description="LoRA by graph rewriting")
    commands = parser.add_subparsers(required=True, metavar="command")
    try:
        _add_bench(commands.add_parser("bench", help="measure lorafx next to the frozen base and to other libraries"))
    except ModuleNotFoundError as missing:
        parser.error(f"bench needs {missing.name}: pip install 'lorafx[bench]'")
    asked = parser.parse_args(arguments)
    return asked.run(asked)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    from .bench import command

    command.add_options(parser)
    parser.set_defaults(run=command.main)


if __name__ == "__main__":
    sys.exit(main())
