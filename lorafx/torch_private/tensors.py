"""What torch knows about tensors, the transforms that they run in, and hooks of modules, and does not document."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._guards import TracingContext
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = [
    # Whether a tensor's subclass is made of other tensors, as DTensor is. Without it, kernels would be given such.
    "is_traceable_wrapper_subclass",
    # A context outside all torch.func transforms. Without it, a model called within one could not be captured.
    "temporarily_clear_interpreter_stack",
]

# Contexts in which torch calls no `__torch_function__`: of modes and subclasses, or of subclasses alone. Without them,
# what lorafx asks about a tensor would be taken for what the model asks, and deferred logits would ask themselves.
DisableTorchFunction = torch._C.DisableTorchFunction
DisableTorchFunctionSubclass = torch._C.DisableTorchFunctionSubclass

# A context in which subclasses' `__torch_function__` is called again. Without it, an operator that was given one of
# torchao's tensors could not run code that is given another.
enabled_torch_function = torch._C._EnableTorchFunction

# Whether these are off. Without it, nobody could tell that a function hides from the classes of what it is given.
is_torch_function_enabled = torch._C._is_torch_function_enabled

# Makes a tensor of a Python class without memory. Without it, logits could not be computed when they are asked for.
make_wrapper_subclass = Tensor._make_wrapper_subclass

# Whether torch may use oneDNN at present. Without it, `torch.backends.mkldnn.flags` would not be obeyed.
is_mkldnn_enabled = torch._C._get_mkldnn_enabled

# The product of two matrices of int8, in int32. Without it, fingerprints of weights would take the time of a merge.
product_of_bytes = torch._int_mm

# What a module's class calls its hooks and forward by; an attribute of that name is called in its place. Without it, a
# part of a model that is given another forward, and called alone, would compute without adapters.
ENTRANCE = "_call_impl"

# The code that each call of a module passes, whose `self`, `args` and `kwargs` are the module and what it is given.
# Without it, a model would be captured up to its first loop over a size for each kind of call.
MODULE_CALL = nn.Module._wrapped_call_impl.__code__

# The dicts of a module that hold hooks around its forward and backward. Without them, graphs would pass hooks by.
CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# Those around its forward alone. Without them, hooks that cast or load weights for a call would be taken for operators.
FORWARD_HOOKS = ("_forward_pre_hooks", "_forward_hooks")

# All dicts of a module that hold hooks, or say how to call them. Without them, a mirror would share its original's.
MODULE_HOOKS = (
    *CALL_HOOKS,
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def function_modes() -> int:
    """How many torch function modes are on in this thread. Without it, a mode could not tell whether others are on."""
    return torch._C._len_torch_function_stack()


def is_innermost_mode(mode: TorchFunctionMode) -> bool:
    """Whether this is the torch function mode that sees functions first. Without it, another one would be taken off."""
    depth = function_modes()
    return depth > 0 and torch._C._get_function_stack_at(depth - 1) is mode


class WithoutMode:
    """A context without a torch function mode that is the innermost. Without it, a module's equation would be looked at
    operator by operator by the mode that has called it."""

    def __init__(self, mode: TorchFunctionMode) -> None:
        self.mode = mode

    def __enter__(self) -> None:
        torch._C._pop_torch_function_stack()

    def __exit__(self, *_: object) -> None:
        torch._C._push_on_torch_function_stack(self.mode)


def put_function_mode(mode: TorchFunctionMode) -> None:
    """Put a torch function mode on, beneath all others. Without it, modes would be taken off in another order than
    they were put on."""
    _set_function_modes([*_function_modes(), mode])


def take_function_mode(mode: TorchFunctionMode) -> None:
    """Take a torch function mode off, wherever it is. Without it, a default device that a model sets would be."""
    _set_function_modes([each for each in _function_modes() if each is not mode])


def _function_modes() -> list[TorchFunctionMode]:
    return [torch._C._get_function_stack_at(number) for number in reversed(range(function_modes()))]


def _set_function_modes(modes: list[TorchFunctionMode]) -> None:
    for _ in range(function_modes()):
        torch._C._pop_torch_function_stack()
    for each in reversed(modes):
        torch._C._push_on_torch_function_stack(each)


def backward_pass() -> int:
    """The number of the backward pass that autograd runs in this thread, -1 for none.

    Without it, checkpointed layers could be served in two ways, and a backward be taken for the model's own code.
    """
    return torch._C._current_graph_task_id()


def buffers_of_no_state_dict(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's buffers that are registered as not persistent. Without it, scales would be lost on the meta device."""
    return {name: module._buffers[name] for name in module._non_persistent_buffers_set}


def call_hooks(module: nn.Module) -> list[dict[int, Any]]:
    """The dicts of `CALL_HOOKS` of a module."""
    return [vars(module)[name] for name in CALL_HOOKS]


def global_call_hooks() -> list[dict[int, Any]]:
    """The same for hooks around every module of the process. Without it, graphs would pass these by."""
    return [vars(torch_module)[f"_global{name}"] for name in CALL_HOOKS]


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to. Without it, a write between forward and backward would go unnoticed."""
    return tensor._version


# The same as a function written in C, for hundreds of tensors a call.
fast_version_of = Tensor._version.__get__  # type: ignore[attr-defined]


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a tensor is one that only a torch.func transform sees. Without it, lorafx would look at its values."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def is_batched_gradient(tensor: Tensor) -> bool:
    """Whether a gradient is several at once (`is_grads_batched`). Without it, formulas would write to such in place."""
    return torch._C._functorch.is_legacy_batchedtensor(tensor)


def is_within_transform() -> bool:
    """Whether a torch.func transform or a forward-mode derivative runs. Without it, fused formulas would, too."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def has_saved_tensors_hooks() -> bool:
    """Whether `saved_tensors_hooks` are on. Without it, no model could be captured inside a checkpointed function."""
    return torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]


def moves_saved_tensors() -> bool:
    """Whether somebody keeps what backward needs elsewhere. Without it, a CUDA graph would be recorded with that."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None  # type: ignore[attr-defined]


def is_compiled_now() -> bool:
    """Whether a compiler traces what runs now. Without it, who only asks for shapes would leave guards on sizes."""
    return TracingContext.try_get() is not None


def base_of(tensor: Tensor) -> Tensor | None:
    """The tensor that this one is a view of, if it is one; in inference mode torch does not say."""
    return tensor._base


def list_own_weights(root: nn.Module) -> None:
    """Have recurrent layers below a module know of the weights that they have now, as they do when they run.

    Without it, they would be found to change themselves in a call where stand-ins are in the place of their weights.
    """
    for module in root.modules():
        if isinstance(module, nn.RNNBase):
            weights = [getattr(module, name, None) for name in module._flat_weights_names]
            vars(module)["_flat_weights"] = weights
            vars(module)["_flat_weight_refs"] = [None if weight is None else weakref.ref(weight) for weight in weights]
