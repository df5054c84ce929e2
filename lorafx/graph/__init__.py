"""The graph: rules that rewrite it, blocks that repeat in it, and what may be known about it.

In comes a captured graph over a module tree; whatever a pass needs to look at it or change it is here. `match`,
`emit` and `rule` rewrite; `regions`, `blocks` and `outline` make one graph of layers that repeat; `effects` and
`writes` say what may be dropped or moved; `masks/` computes what sizes alone decide; `verify` checks; `printing`
shows.
"""

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
    write,
)
from .match import Match, NoMatch, arguments, match
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
    "arguments",
    "describe",
    "fake_mode_of",
    "fake_value",
    "first_match",
    "made_by",
    "marks_of",
    "match",
    "resolve",
    "within_vmap",
    "write",
    "writes",
]
