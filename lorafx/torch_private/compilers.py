"""What torch.compile is made of: Dynamo, AOTAutograd and Inductor, their settings and where passes may be added."""

from __future__ import annotations

from typing import Any

import torch
from torch._dynamo import config as dynamo
from torch._dynamo import lookup_backend
from torch._dynamo.utils import get_metrics_context
from torch._functorch import config as aot_autograd
from torch._inductor import config as inductor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

__all__ = [
    # What runs after Inductor's passes, and what says in its cache that it did. Without it, no pass of ours would.
    "CustomGraphPass",
    # Settings of AOTAutograd, which decides what is kept for backward. Without it, `activation_budget` did nothing.
    "aot_autograd",
    # Settings of Dynamo. Without it, the bench might time models that had silently gone back to eager.
    "dynamo",
    # A number for the text of files, for a `CustomGraphPass`. Without it, old compilations would outlive our passes.
    "get_hash_for_files",
    # Settings of Inductor. Without it, our passes would push others' aside, and add where a template does.
    "inductor",
    # A backend by its name. Without it, graphs would be compiled by those backends alone that are functions.
    "lookup_backend",
]

# Inductor's setting for a pass after its own on ATen operators.
POST_PASS = "post_grad_custom_post_pass"

# Inductor's setting for its own CUDA graphs.
CUDA_GRAPHS = "triton.cudagraphs"

# AOTAutograd's settings: how much to keep for backward, from 0 to 1; not to recompute what backward needs in memory.
ACTIVATION_BUDGET = "activation_memory_budget"
KEEP_MATERIALIZED = "ban_recompute_materialized_backward"


def inductor_modes() -> dict[str, dict[str, Any]]:
    """Inductor's modes by name, as "max-autotune". Without it, a wrong `mode` would only show when a graph runs."""
    return torch._inductor.list_mode_options()


def settings_of_mode(mode: str) -> dict[str, Any]:
    """What a mode sets of Inductor's configuration."""
    return torch._inductor.list_mode_options(mode, dynamic=True)


def recompile_reason() -> str | None:
    """Why Dynamo compiles a function again, while it does. Without it, `explain()` could not say."""
    return get_metrics_context()._metrics.get("recompile_reason")


def let_inductor_call(operator: Any) -> None:
    """Have Inductor call an operator that it would write out otherwise. Without it, sums would take new memory.

    By itself it refuses operators of ATen that it does not know where the environment has CI set.
    """
    from torch._inductor.lowering import lowerings, make_fallback  # takes seconds; a pass runs when it is there

    if operator not in lowerings:
        make_fallback(operator, warn=False)
