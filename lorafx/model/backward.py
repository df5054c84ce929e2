"""What is said when backward is called and the adapters do not train as one would think.

torch says "element 0 of tensors does not require grad" of a loss that no adapter has a part in, and nothing at all of
adapters that train without their dropout. What a call returns knows why, and says it when backward comes, not before.
But what somebody computes of a result without gradients knows nothing of the result. So a model in train mode that
gives such a result says at once that nothing will train.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError, warn
from ..tree.attached import own_modules
from ..tree.memory import made_for_inference
from .state import State


class NoBackward:
    """What stands for `backward` on a loss that nothing trainable has a part in: it raises `AdapterError`."""

    def __init__(self, reason: str):
        self.reason = reason

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise AdapterError(f"there is nothing to train: {self.reason}")


def require_kept(tree: nn.Module, error: RuntimeError) -> None:
    """Raise `AdapterError` if a call failed because the base was made for inference alone: nothing trains there."""
    is_of_torch = "nference tensor" in str(error)  # other errors of such a model mean something else
    if is_of_torch and torch.is_grad_enabled() and (found := made_for_inference(tree)):
        raise AdapterError(
            f"{found[0]} was made under `torch.inference_mode()`, and torch keeps no such tensor for backward: make or "
            "load the model outside of it, or call it under `torch.no_grad()` if nothing is to train"
        ) from error


def prepare(state: State, tree: nn.Module, result: Any) -> None:
    """Have what a call returned say, once backward is called, why no adapter trains, or that none drops out."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    tensor = _first(result)
    if tensor is None:
        return
    if not tensor.requires_grad and tensor.ndim == 0 and (reason := _reason(state)):
        tensor.backward = NoBackward(reason)  # type: ignore[method-assign, assignment]
    elif tree.training and (state.acting or state.ledger.names) and (reason := _reason(state)):
        _say_nothing_trains(state, tree, reason)
    if tensor.requires_grad and (name := _without_data(state, tree)):
        warn(
            f'{name!r} trains from random start values, where `init_lora_weights="eva"` has data give them: call '
            "`lorafx.initialize_lora_eva_weights(model, dataloader)` before training"
        )
    if tensor.requires_grad and "no dropout" not in state.said and _keeps_all(state, tree):
        tensor.register_hook(lambda _: _say_no_dropout(state))


def _first(result: Any) -> Tensor | None:
    """The tensor that a backward pass is likely to begin with: the result, or the first that it holds, as a loss is."""
    held = list(result.values()) if isinstance(result, dict) else result
    found = next(iter(held), None) if isinstance(held, (tuple, list)) else held
    return found if type(found) is Tensor and found.is_floating_point() else None


def _reason(state: State) -> str | None:
    """Why no adapter trains, in words that say what to do; None if it is not lorafx's doing."""
    if state.ledger.names:
        return f"{', '.join(map(repr, state.ledger.names))} merged; call `unmerge_adapter()` first"
    if not state.acting:
        return "the adapters are disabled" if state.disabled or state.adapters else "there is no adapter"
    frozen = [name for name in state.acting if state.adapters[name].config.inference_mode]
    if len(frozen) == len(state.acting):
        return (
            f"{', '.join(map(repr, frozen))} loaded for inference; pass is_trainable=True to `load` or `load_adapter`, "
            "or call `set_adapter`"
        )
    return None


def _without_data(state: State, tree: nn.Module) -> str:
    """The acting adapter whose start values data would give, that nothing has given any. Each is looked at once."""
    for name in state.acting:
        adapter = state.adapters[name]
        if name in state.given or getattr(adapter.config, "init_lora_weights", None) != "eva":
            continue
        state.given.add(name)
        tensors = (adapter.tensors_at(tree, site).get("lora_B.weight") for site in adapter.selection)
        if any(B is not None and B.requires_grad and not B.is_meta and not B.any() for B in tensors):
            return name
    return ""


def _keeps_all(state: State, tree: nn.Module) -> bool:
    """Whether the acting adapters would drop something out in training, and the model is in evaluation mode."""
    configs = [state.adapters[name].config for name in state.acting if name not in state.ledger.names]
    return not tree.training and any(getattr(config, "lora_dropout", 0) for config in configs)


def _say_nothing_trains(state: State, tree: nn.Module, reason: str) -> None:
    """Once, if the base does not train, either. Checkpoints have a result require gradients that reach nothing."""
    base = (tensor for module in own_modules(tree) for tensor in module._parameters.values() if tensor is not None)
    if "nothing trains" not in state.said and not any(tensor.requires_grad for tensor in base):
        state.said.add("nothing trains")
        warn(
            f"a call in train mode, and there is nothing to train: {reason}. Use `eval()` or `torch.no_grad()` if that "
            "is meant"
        )


def _say_no_dropout(state: State) -> None:
    if "no dropout" not in state.said:
        state.said.add("no dropout")
        warn("trained in evaluation mode, without the adapters' dropout; call `train()` on the model first")
