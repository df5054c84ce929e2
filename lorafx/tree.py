"""One tree of owners: a mirror of the base model's modules that shares every parameter and buffer.

A mirror module is of the same class and has the same attributes as its original; its `_parameters` and `_buffers`
are the original's own dicts, so a tensor replaced in one is replaced in both, while its `_modules` dict is its own:
adapters can hang below it and the original never sees them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import MethodType
from typing import Any

from torch import Tensor, nn

_OWN_DICTS = (
    "_backward_pre_hooks",
    "_backward_hooks",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
# On a module: what `attach` made below it. On an adapted tree: its state. On its class: the base model's class.
ATTACHED, STATE, MIRRORED_AS = "_lorafx_attached", "_lorafx", "_lorafx_mirrored_as"


def mirror(model: nn.Module, memo: dict[int, nn.Module] | None = None) -> nn.Module:
    """A mirror of `model` and all modules below it, without what `attach` hung there."""
    memo = {} if memo is None else memo
    if id(model) in memo:
        return memo[id(model)]
    copy = memo[id(model)] = object.__new__(getattr(type(model), MIRRORED_AS, type(model)))
    copy.__dict__.update({key: value for key, value in vars(model).items() if key not in (ATTACHED, STATE)})
    forward = vars(model).get("forward")
    if getattr(forward, "lorafx", False) or STATE in vars(model):  # how an adapted tree serves a call of this module
        copy.__dict__.pop("forward", None)
        copy.__dict__.update(getattr(forward, "replaced", {}))
    attached = vars(model).get(ATTACHED, ())
    copy.__dict__["_modules"] = {
        name: child if child is None else mirror(child, memo)
        for name, child in model._modules.items()
        if name not in attached
    }
    for name in _OWN_DICTS:
        if name in vars(model):
            copy.__dict__[name] = vars(model)[name].copy()
    return copy


def rebind(memo: dict[int, nn.Module]) -> None:
    """Point what mirrored modules hold outside `_modules` at the mirrors: bound methods, modules, lists of them."""
    for copy in memo.values():
        for key, value in vars(copy).items():
            if key not in ("_modules", "_parameters", "_buffers"):
                copy.__dict__[key] = _redirected(value, memo)


def without_hooks(module: nn.Module) -> None:
    """Forget the hooks of a mirror itself: whoever calls its original runs them."""
    for name in _OWN_DICTS:
        vars(module).get(name, {}).clear()


def _redirected(value: Any, memo: dict[int, nn.Module]) -> Any:
    if isinstance(value, MethodType) and id(value.__self__) in memo:
        return MethodType(value.__func__, memo[id(value.__self__)])
    if isinstance(value, nn.Module):
        return memo.get(id(value), value)
    if type(value) in (list, tuple) and any(isinstance(item, (nn.Module, MethodType)) for item in value):
        return type(value)(_redirected(item, memo) for item in value)
    if type(value) is dict and any(isinstance(item, (nn.Module, MethodType)) for item in value.values()):
        return {key: _redirected(item, memo) for key, item in value.items()}
    return value


def mirrored(model: nn.Module) -> nn.Module:
    """A complete mirror of `model`, ready to be called or adapted."""
    memo: dict[int, nn.Module] = {}
    copy = mirror(model, memo)
    rebind(memo)
    return copy


def isolated(copy: nn.Module) -> nn.Module:
    """A complete mirror after its modules got containers of their own: nothing put into one is seen by the original.

    While a mirror is captured, its parameters are stand-ins, and the original may be running in another thread.
    """
    memo: dict[int, Any] = {}
    for module in copy.modules():
        module.__dict__.update({name: _copied(value, memo) for name, value in vars(module).items()})
        for name, tensor in module._parameters.items():
            if tensor is not None and not isinstance(
                tensor, nn.Parameter
            ):  # what torch.func.functional_call puts there
                module._parameters[name] = nn.Parameter(tensor.detach(), tensor.requires_grad)
    return copy


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of plain containers, whatever else they hold; one that is found twice is one copy."""
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


def branch(root: nn.Module, owners: Iterable[str]) -> nn.Module:
    """A bare tree with only these modules of `root`, live and under their own paths."""
    owners = sorted(set(owners), key=lambda path: path.count("."))
    if "" in owners:
        return root
    bare = nn.Module().train(root.training)
    for path in owners:
        inner = bare
        *parents, last = path.split(".")
        for atom in parents:
            if atom not in inner._modules:
                inner.add_module(atom, nn.Module().train(root.training))
            inner = inner.get_submodule(atom)
        inner._modules.setdefault(last, root.get_submodule(path))
    return bare


def own_children(module: nn.Module) -> list[nn.Module]:
    """The children of a module without those that adapters hung there."""
    attached = vars(module).get(ATTACHED, ())
    return [child for name, child in module._modules.items() if child is not None and name not in attached]


def own_modules(root: nn.Module) -> Iterator[nn.Module]:
    """The modules of a tree, each once, without those that adapters hung there."""
    seen: set[int] = set()
    pending = [root]
    while pending:
        module = pending.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield module
            pending.extend(own_children(module))


def has_copies_among_children(module: nn.Module) -> bool:
    """Whether an adapter keeps copies below a module that has other children: a container that is saved as a whole."""
    return bool(vars(module).get(ATTACHED)) and bool(own_children(module))


def attach(root: nn.Module, path: str, tensor: nn.Parameter) -> None:
    """Hang a parameter at `path`; modules that are missing on the way are made, and remembered as attached."""
    *parents, last = path.split(".")
    owner = root
    for atom in parents:
        if atom not in owner._modules:
            owner.add_module(atom, nn.Module().train(owner.training))
            owner.__dict__[ATTACHED] = (*vars(owner).get(ATTACHED, ()), atom)
        owner = owner.get_submodule(atom)
    owner.register_parameter(last, tensor)


def detach(root: nn.Module, paths: Iterable[str]) -> None:
    """Take parameters away again, and the modules that `attach` made for them once they are empty.

    Those that went with a module that somebody took away are passed over.
    """
    for path in paths:
        if find_tensor(root, path) is None:
            continue
        owners = [root]
        *parents, last = path.split(".")
        for atom in parents:
            owners.append(owners[-1].get_submodule(atom))
        del owners[-1]._parameters[last]
        for owner, child, atom in reversed(list(zip(owners, owners[1:], parents))):
            if atom in vars(owner).get(ATTACHED, ()) and not child._modules and not child._parameters:
                del owner._modules[atom]
                owner.__dict__[ATTACHED] = tuple(a for a in vars(owner)[ATTACHED] if a != atom)


def tensor_at(root: nn.Module, path: str) -> Tensor:
    """The tensor at a dotted path that is known to have one."""
    found = find_tensor(root, path)
    assert found is not None, path
    return found


def find_tensor(root: nn.Module, path: str) -> Tensor | None:
    """The tensor at a dotted path, or None."""
    value: Any = root
    for atom in path.split("."):
        value = getattr(value, atom, None)
        if value is None:
            return None
    return value if isinstance(value, Tensor) else None


def first_name(root: nn.Module, path: str) -> str:
    """The first of the names that a parameter goes by."""
    parameter = root.get_parameter(path)
    return next(name for name, other in root.named_parameters() if other is parameter)


def trained_paths(root: nn.Module) -> frozenset[str]:
    """Paths of the parameters of the base itself that are trained."""
    own = {id(module) for module in own_modules(root)}
    return frozenset(
        f"{path}.{name}".lstrip(".")
        for path, module in root.named_modules(remove_duplicate=False)
        if id(module) in own
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    )


def set_trainable(root: nn.Module, trainable: Iterable[str]) -> None:
    """Let exactly the parameters at these paths be trained."""
    wanted = {id(find_tensor(root, path)) for path in trainable}
    for parameter in root.parameters():
        flag = id(parameter) in wanted
        if parameter.requires_grad != flag:
            parameter.requires_grad_(flag)
