"""`lorafx`, or `python -m lorafx`: the commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .commands import run


def main(words: Sequence[str] | None = None) -> int:
    return run(sys.argv[1:] if words is None else words)


if __name__ == "__main__":
    sys.exit(main())
