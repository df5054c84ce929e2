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
    resolve,
    within_vmap,
)
from .match import Match, NoMatch, match
from .rule import Rule
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
    "made_by",
    "match",
    "resolve",
    "within_vmap",
    "writes",
]
