"""What torch.compile is made of: Dynamo and AOTAutograd, their settings, and what they leave of a model.

Dynamo takes seconds to import, and most models are never compiled: torch imports it itself when somebody first names
`torch._dynamo` or `torch._inductor`, so only functions do so here.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy, set_eval_frame
from torch._functorch import config as aot_autograd

__all__ = [
    # Settings of AOTAutograd, which decides what is kept for backward. Without it, `activation_budget` did nothing.
    "aot_autograd",
]

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


def lookup_backend(name: str) -> Callable[..., Any]:
    """A backend by its name. Without it, graphs would be compiled by those backends alone that are functions."""
    return torch._dynamo.lookup_backend(name)


def recompile_reason() -> str | None:
    """Why Dynamo compiles a function again, while it does. Without it, `explain()` could not say."""
    return torch._dynamo.utils.get_metrics_context()._metrics.get("recompile_reason")


def recompile_up_to(times: int) -> None:
    """Let Dynamo compile a function so often. Without it, the bench might time what had gone back to eager unsaid."""
    torch._dynamo.config.recompile_limit = times


# --- torch.compile around lorafx -------------------------------------------------------------------------------------


_RUN_AS_IT_IS = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.DEFAULT)  # what it calls is looked at
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
                _local.compiler = torch._dynamo.eval_frame.innermost_backend(callback)
            try:
                return function(*args, **kwargs)
            finally:
                _local.compiler = outer
                set_eval_frame(callback)

        set_code_exec_strategy(entry.__code__, _RUN_AS_IT_IS)  # type: ignore[attr-defined]
        entry._torchdynamo_disable = True  # type: ignore[attr-defined]
        entry._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
        return entry

    return decorate


def compiler_in_charge() -> Any:
    """What `backend=` became in the torch.compile around the function that runs now; None where there is none."""
    return getattr(_local, "compiler", None)


def _is_there() -> bool:
    """Whether anything in this process can have been compiled."""
    return "torch._dynamo" in sys.modules


def is_of_compiled_modules(kind: type[nn.Module]) -> bool:
    """Whether torch.compile makes modules of this class. Without it, no compiled part of a model would be found."""
    if not _is_there():
        return False
    from torch._dynamo.eval_frame import OptimizedModule  # waits where another thread imports it now

    return issubclass(kind, OptimizedModule)


def compiled_module(model: nn.Module) -> nn.Module | None:
    """The module that torch.compile was given, if this is what it made. Without it, names would have its prefix."""
    return model._orig_mod if is_of_compiled_modules(type(model)) else None  # type: ignore[return-value]


def uncompiled(value: Any) -> Any:
    """The function (or bound method) that torch.compile was given, if this is what it made; else the value itself.

    Without it, a mirror would call compiled functions that run on the original.
    """
    if isinstance(value, MethodType):
        function = uncompiled(value.__func__)
        return value if function is value.__func__ else MethodType(function, value.__self__)
    if not isinstance(value, FunctionType) or hasattr(value, "_torchdynamo_disable") or not _is_there():
        return value
    inner = torch._dynamo.eval_frame.innermost_fn(value)
    code = getattr(inner, "__code__", None)
    if inner is not value and code is not None and code.co_filename == torch._dynamo.external_utils.__file__:
        return inspect.unwrap(inner)  # a function that Dynamo would not trace by itself, as a layer of torch's has
    return inner


def inductor_options(compiler: Any) -> dict[str, Any] | None:
    """What `mode=` and `options=` of torch.compile set of Inductor's configuration; None for another backend."""
    return dict(compiler.config) if isinstance(compiler, torch._TorchCompileInductorWrapper) else None
