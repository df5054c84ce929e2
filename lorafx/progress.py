"""Progress: a line on the terminal about what takes longer than two seconds. Pipes and logs are told nothing."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

PATIENCE = 2.0  # seconds


@contextlib.contextmanager
def announced(what: str) -> Iterator[None]:
    """Say what is being done once it has taken `PATIENCE`, and at its end how long it took."""
    terminal, start = sys.stderr, time.perf_counter()
    if terminal is None or not terminal.isatty():
        yield
        return
    said = threading.Timer(PATIENCE, lambda: terminal.write(f"lorafx: {what} …\n"))
    said.daemon = True
    said.start()
    try:
        yield
    finally:
        said.cancel()
        if (seconds := time.perf_counter() - start) > PATIENCE:
            terminal.write(f"lorafx: {what} took {seconds:.0f} s\n")
