"""What a pass of ours within Inductor is made of. Imported when something is compiled, for it takes seconds."""

from __future__ import annotations

from typing import Any

from torch._inductor import config as inductor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

__all__ = [
    # What runs after Inductor's passes, and what says in its cache that it did. Without it, no pass of ours would.
    "CustomGraphPass",
    # A number for the text of files, for a `CustomGraphPass`. Without it, old compilations would outlive our passes.
    "get_hash_for_files",
    # Settings of Inductor. Without it, our passes would push others' aside, and add where a template does.
    "inductor",
]

# Inductor's setting for a pass after its own on ATen operators.
POST_PASS = "post_grad_custom_post_pass"


def let_inductor_call(operator: Any) -> None:
    """Have Inductor call an operator that it would write out otherwise. Without it, sums would take new memory.

    By itself it refuses operators of ATen that it does not know where the environment has CI set.
    """
    from torch._inductor.lowering import lowerings, make_fallback  # takes seconds; a pass runs when it is there

    if operator not in lowerings:
        make_fallback(operator, warn=False)
