"""Mirrors: a copy of a model's modules that shares every parameter and buffer with the model.

A mirror module is of the same class and has the same attributes as its original; its `_parameters` and `_buffers` are
the original's own dicts, so a tensor replaced in one is replaced in both, while its `_modules` dict is its own:
adapters can hang below it and the original never sees them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..torch_private.compilers import uncompiled
from ..torch_private.tensors import ENTRANCE, FORWARD_HOOKS, MODULE_HOOKS
from ..torch_private.tracing import real
from .attached import ATTACHED
from .holdings import CONTAINERS, PLAIN
from .hooks import Hooks
from .redirection import Redirection
from .wrappers import unwrap_forward, unwrapped

# Attributes: of an adapted tree, its state; of an adapted tree's class, the base model's class; of a module that is
# served, the forward that it has of itself, where that is not its class's.
STATE, MIRRORED_AS, OWN = "_lorafx", "_lorafx_mirrored_as", "_lorafx_forward"
_SHARED = ("_modules", "_parameters", "_buffers")  # these are a mirror's own, or its original's, and redirect nothing


def mirror(model: nn.Module, memo: dict[int, nn.Module] | None = None) -> nn.Module:
    """A mirror of `model` and all modules below it, without what `attach` hung there, and without wrappers.

    Raises `AdapterError` for a wrapper that cannot be taken off.
    """
    memo = {} if memo is None else memo
    if id(model) in memo:
        return memo[id(model)]
    if (inner := unwrapped(model)) is not model:
        copy = memo[id(model)] = mirror(inner, memo)
        return copy
    copy = memo[id(model)] = object.__new__(getattr(type(model), MIRRORED_AS, type(model)))
    copy.__dict__.update({key: value for key, value in vars(model).items() if key not in (ATTACHED, STATE)})
    if getattr(copy.__dict__.get(ENTRANCE), "lorafx", False):
        del copy.__dict__[ENTRANCE]
    forward = uncompiled(vars(model).get("forward"))
    if STATE in vars(model):  # `model` is adapted, and its `forward` serves calls, whoever has wrapped it
        copy.__dict__.pop("forward", None)
        forward = copy.__dict__.pop(OWN, None)
    while getattr(forward, "lorafx", False):
        copy.__dict__.pop("forward", None)
        forward = forward.replaced.get("forward")  # type: ignore[union-attr]
    if forward is not None:
        copy.__dict__["forward"] = forward
    attached = vars(model).get(ATTACHED, ())
    copy.__dict__["_modules"] = {
        name: child if child is None else mirror(child, memo)
        for name, child in model._modules.items()
        if name not in attached
    }
    for name in MODULE_HOOKS:
        if name in vars(model):
            copy.__dict__[name] = vars(model)[name].copy()
    unwrap_forward(copy, model)
    for name in FORWARD_HOOKS:
        copy.__dict__[name] = Hooks.of(copy.__dict__[name])
    return copy


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward that a served module has of itself, below what lorafx put in its place."""
    own = vars(module).get(OWN)
    return getattr(type(module), MIRRORED_AS, type(module)).forward.__get__(module) if own is None else own


def show_own_forward(module: nn.Module, own: Callable[..., Any] | None) -> None:
    """Say what `own_forward` is of a module: None for its class's. It is a setting, which graphs are specialised on."""
    if own is None:
        vars(module).pop(OWN, None)
    elif vars(module).get(OWN) is not own:
        vars(module)[OWN] = own


def rebind(memo: dict[int, nn.Module]) -> None:
    """Redirect whatever mirrors hold that refers to originals to the mirrors."""
    held = [
        (vars(twin), name)
        for twin in memo.values()
        for name, value in vars(twin).items()
        if name not in _SHARED and not isinstance(value, PLAIN) and not (isinstance(value, CONTAINERS) and not value)
    ]
    redirection = Redirection(memo, [attributes[name] for attributes, name in held])
    for attributes, name in held:
        attributes[name] = redirection(attributes[name])


def without_hooks(module: nn.Module) -> None:
    """Clear a mirror's own hooks, not its children's: they run where the original is called."""
    for name in MODULE_HOOKS:
        vars(module).get(name, {}).clear()


def mirrored(model: nn.Module) -> nn.Module:
    """A complete mirror of `model`, ready to be called or adapted."""
    memo: dict[int, nn.Module] = {}
    copy = mirror(model, memo)
    rebind(memo)
    return copy


def isolated(copy: nn.Module) -> nn.Module:
    """Give each module of a mirror its own copy of every dict, list and set that it holds, and return the mirror.

    A capture puts stand-ins in the place of parameters; the original, which may run in another thread, must not see it.
    """
    memo: dict[int, Any] = {}
    for module in copy.modules():
        module.__dict__.update({name: _copied(value, memo) for name, value in vars(module).items()})
        for name, tensor in module._parameters.items():
            if tensor is None or ((own := real(tensor)) is tensor and isinstance(tensor, nn.Parameter)):
                continue
            # What torch.func.functional_call and torch.export put there, and FSDP1, as a plain attribute, too.
            module._parameters[name] = nn.Parameter(own.detach(), tensor.requires_grad)
            module.__dict__.pop(name, None)
        module._buffers.update({name: real(buffer) for name, buffer in module._buffers.items() if buffer is not None})
    return copy


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of a list, dict or set; a container held in two places is copied once, any other value is shared."""
    if type(value) not in (list, dict, set) or id(value) in memo:
        return memo.get(id(value), value)
    own = memo[id(value)] = type(value)()
    if isinstance(own, dict):
        own.update({key: _copied(item, memo) for key, item in value.items()})
    elif isinstance(own, list):
        own.extend(_copied(item, memo) for item in value)
    else:
        own.update(value)
    return own
