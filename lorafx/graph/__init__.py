"""The graph: rules that rewrite it, blocks for layers that repeat, and what can be found out about it.

In comes a captured graph over a module tree; whatever a pass needs to look at it or change it is here. `match`, `emit`
and `rule` rewrite, and `values` has the shapes of new nodes; `regions`, `blocks` and `outline` make one graph of layers
that repeat; `modules` makes graph modules that read a tree, and `module_stacks` names for each node the modules that it
is in; `effects` and `writes` say what may be dropped or moved; `description` has keys by which values are compared;
`masks/` computes what depends on sizes alone; `verify` checks; `printing` shows.
"""

from .blocks import layers_of
from .emit import (
    ADAPTED_BY,
    INHERITED,
    MADE_BY,
    SITE,
    Attribute,
    Provenance,
    describe,
    made_by,
    marks_of,
    within_vmap,
    write,
)
from .match import Match, NoMatch, arguments, match
from .rule import Rule, first_match, rewrite_updates
from .values import fake_mode_of, fake_value, resolve
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
    "layers_of",
    "made_by",
    "marks_of",
    "match",
    "resolve",
    "rewrite_updates",
    "within_vmap",
    "write",
    "writes",
]
