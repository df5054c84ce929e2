"""A line about what takes long, on a terminal alone."""

import io
import time

import pytest

from lorafx import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("seconds", "stream", "said"), [(0.3, Terminal, True), (0, Terminal, False), (0.3, io.StringIO, False)]
)
def test_only_a_terminal_is_told_and_only_of_what_takes_long(seconds, stream, said, monkeypatch):
    told = stream()
    monkeypatch.setattr("sys.stderr", told)
    monkeypatch.setattr(progress, "PATIENCE", 0.1)
    with progress.announced("capturing Llama"):
        time.sleep(seconds)
    assert told.getvalue() == ("lorafx: capturing Llama …\nlorafx: capturing Llama took 0 s\n" if said else "")


def test_what_fails_says_no_more_afterwards(monkeypatch):
    told = Terminal()
    monkeypatch.setattr("sys.stderr", told)
    monkeypatch.setattr(progress, "PATIENCE", 0.1)
    with pytest.raises(ValueError), progress.announced("merging"):
        raise ValueError
    time.sleep(0.2)
    assert told.getvalue() == ""
