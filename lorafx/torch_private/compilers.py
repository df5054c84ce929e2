"""What torch.compile is made of: Dynamo, AOTAutograd and Inductor, their settings and where passes may be added."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch._C._dynamo.eval_frame import set_eval_frame
from torch._dynamo import config as dynamo
from torch._dynamo import external_utils, lookup_backend
from torch._dynamo.decorators import skip
from torch._dynamo.eval_frame import OptimizedModule, innermost_backend, innermost_fn
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


# --- torch.compile around lorafx -------------------------------------------------------------------------------------


_local = threading.local()  # `compiler`: what torch.compile would use for what a thread calls now


def not_traced(reason: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Have Dynamo run a function, and all that it calls, as it is; meanwhile `compiler_in_charge` says what it is for.

    Dynamo gives the reason where it must not leave anything out. Without it, it would trace lorafx's own passes.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def entry(*args: Any, **kwargs: Any) -> Any:
            callback = set_eval_frame(None)  # first of all: Dynamo looks at each function that is called before
            if callback is None:  # it is off, as in the parts of a model that runs already
                return function(*args, **kwargs)
            outer = compiler_in_charge()
            if callable(callback):
                _local.compiler = innermost_backend(callback)
            try:
                return function(*args, **kwargs)
            finally:
                _local.compiler = outer
                set_eval_frame(callback)

        skip(entry)
        entry._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
        return entry

    return decorate


def compiler_in_charge() -> Any:
    """What `backend=` became in the torch.compile around the function that runs now; None where there is none."""
    return getattr(_local, "compiler", None)


def compiled_module(model: nn.Module) -> nn.Module | None:
    """The module that torch.compile was given, if this is what it made. Without it, names would have its prefix."""
    return model._orig_mod if isinstance(model, OptimizedModule) else None


def uncompiled(value: Any) -> Any:
    """The function (or bound method) that torch.compile was given, if this is what it made; else the value itself.

    Without it, a mirror would call compiled functions that run on the original.
    """
    if isinstance(value, MethodType):
        function = uncompiled(value.__func__)
        return value if function is value.__func__ else MethodType(function, value.__self__)
    if not isinstance(value, FunctionType) or hasattr(value, "_torchdynamo_disable"):
        return value
    inner = innermost_fn(value)
    code = getattr(inner, "__code__", None)
    if inner is not value and code is not None and code.co_filename == external_utils.__file__:
        return inspect.unwrap(inner)  # a function that Dynamo would not trace by itself, as a layer of torch's has
    return inner


def inductor_options(compiler: Any) -> dict[str, Any] | None:
    """What `mode=` and `options=` of torch.compile set of Inductor's configuration; None for another backend."""
    return dict(compiler.config) if isinstance(compiler, torch._TorchCompileInductorWrapper) else None


def let_inductor_call(operator: Any) -> None:
    """Have Inductor call an operator that it would write out otherwise. Without it, sums would take new memory.

    By itself it refuses operators of ATen that it does not know where the environment has CI set.
    """
    from torch._inductor.lowering import lowerings, make_fallback  # takes seconds; a pass runs when it is there

    if operator not in lowerings:
        make_fallback(operator, warn=False)
