"""The pipeline: passes in order, the graph verified after each.

In come a graph and the context of the adapters that act; out come the rewritten graph and a `step` for each pass, which
says what it did. `definition` says what a pass is, `context` what it is given; `pipeline` checks the order and runs the
passes; `text` reads a pipeline's text.
"""

from .context import Context
from .definition import Pass
from .pipeline import Observer, Pipeline
from .step import Step

__all__ = ["Context", "Observer", "Pass", "Pipeline", "Step"]
