"""Showing: what the passes made of a call, for people to read.

In comes a captured graph and a pipeline, which is run once more on a copy while each stage is recorded as plain values
(`history`). Out comes `text` about one place in it, or a `page` in one HTML file that shows all of it (with what is in
`assets/`). `heat` is how much each adapter does at each site.
"""

from .heat import Heat, heats
from .history import History, Line, Part, Stage, record
from .page import write_page
from .text import View, view

__all__ = ["Heat", "History", "Line", "Part", "Stage", "View", "heats", "record", "view", "write_page"]
