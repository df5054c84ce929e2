"""Rules over graphs: match a pattern, emit its replacement, remember who made what."""

from .emit import (
    ADAPTED_BY,
    INHERITED,
    MADE_BY,
    SITE,
    Attribute,
    Provenance,
    describe,
    fake_mode_of,
    fake_value,
    made_by,
    marks_of,
    resolve,
    within_vmap,
)
from .match import Match, NoMatch, match
from .rule import Rule, first_match
from .writes import writes

__all__ = [
    "ADAPTED_BY",
    "INHERITED",
    "MADE_BY",
    "SITE",
    "Attribute",
    "Match",
    "NoMatch",
    "Provenance",
    "Rule",
    "describe",
    "fake_mode_of",
    "fake_value",
    "first_match",
    "made_by",
    "marks_of",
    "match",
    "resolve",
    "within_vmap",
    "writes",
]
