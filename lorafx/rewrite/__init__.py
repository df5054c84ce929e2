"""Rules over graphs: match a pattern, emit its replacement, remember who made what."""

from .emit import Attribute, Provenance, fake_mode_of, fake_value, made_by, resolve
from .match import Match, NoMatch, match
from .rule import Rule

__all__ = [
    "Attribute",
    "Match",
    "NoMatch",
    "Provenance",
    "Rule",
    "fake_mode_of",
    "fake_value",
    "made_by",
    "match",
    "resolve",
]
