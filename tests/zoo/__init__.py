"""The zoo: tiny random models of many architectures, for tests that every model should pass.

@pytest.mark.parametrize("name", zoo.ENTRIES)
"""

from . import causal, encoders, plain, vision
from .entry import Call, Entry

__all__ = ["ENTRIES", "Call", "Entry"]

ENTRIES = {entry.name: entry for part in (causal, encoders, vision, plain) for entry in part.ENTRIES}
