"""Lookup: tensors of a module tree by their dotted paths."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def find_tensor(root: nn.Module, path: str) -> Tensor | None:
    """The tensor at a dotted path, or None. By the dicts of modules where it is there: `getattr` takes far longer."""
    value: Any = root
    *owners, name = path.split(".")
    for atom in owners:
        child = value._modules.get(atom) if isinstance(value, nn.Module) else None
        value = getattr(value, atom, None) if child is None else child
        if value is None:
            return None
    found = value._parameters.get(name) if isinstance(value, nn.Module) else None
    found = getattr(value, name, None) if found is None else found
    return found if isinstance(found, Tensor) else None


def find_tensors(root: nn.Module, paths: Iterable[str]) -> list[Tensor | None]:
    """`find_tensor` of each of these paths. Each module on their ways is looked up once."""
    return _ways(tuple(paths)).tensors(root)


class Ways:
    """The ways to several tensors, worked out once for whoever asks for the same paths again and again.

    `children` are the modules on the ways, each by the number of its parent, the root's being 0; `ends` are the paths'
    ends, each with the number of its module.
    """

    def __init__(self, paths: Iterable[str]):
        self.paths = tuple(paths)
        self.children: list[tuple[int, str]] = []
        numbers = {"": 0}

        def number(path: str) -> int:
            if path not in numbers:
                parent, _, atom = path.rpartition(".")
                self.children.append((number(parent), atom))
                numbers[path] = len(self.children)
            return numbers[path]

        owners = (path.rpartition(".") for path in self.paths)
        self.ends = [(number(owner), name) for owner, _, name in owners]

    def modules(self, root: nn.Module) -> list[Any]:
        """The modules that are on the ways now, the root first; None for one that is not there."""
        modules: list[Any] = [root]
        for parent, atom in self.children:
            module = modules[parent]
            child = module._modules.get(atom) if isinstance(module, nn.Module) else None
            modules.append(getattr(module, atom, None) if child is None else child)
        return modules

    def tensors(self, root: nn.Module) -> list[Tensor | None]:
        """The tensors that are there now, or None."""
        modules, found = self.modules(root), []
        for owner, name in self.ends:
            module = modules[owner]
            tensor: Any = module._parameters.get(name) if isinstance(module, nn.Module) else None
            if tensor is None and not isinstance(tensor := getattr(module, name, None), Tensor):
                tensor = None
            found.append(tensor)
        return found


_ways = functools.lru_cache(maxsize=64)(Ways)


def tensor_at(root: nn.Module, path: str) -> Tensor:
    """The tensor at a dotted path that is known to have one."""
    found = find_tensor(root, path)
    assert found is not None, path
    return found


def endings(path: str) -> Iterator[str]:
    """The path, and what is left of it after each dot."""
    while path:
        yield path
        path = path.partition(".")[2]


def module_at(root: nn.Module, path: str) -> nn.Module:
    """`root.get_submodule(path)`, by a shorter way: calls ask for hundreds of modules."""
    module = root
    for atom in path.split(".") if path else ():
        child = module._modules.get(atom)
        module = getattr(module, atom) if child is None else child  # a wrapper gives what is within it
    return module


def given_by(model: nn.Module, getter: str) -> nn.Module | None:
    """What one of transformers' getters gives; None for a model without it, or whose getter raises, as many do."""
    try:
        return getattr(model, getter)()
    except Exception:
        return None


def first_name(root: nn.Module, path: str) -> str:
    """The first path, in the tree's order, of the parameter at `path`, which may have several."""
    parameter = root.get_parameter(path)
    return next(name for name, other in root.named_parameters() if other is parameter)


def copy_into(tree: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write tensors into the tree, in place."""
    with torch.inference_mode(False), torch.no_grad():
        for path, value in values.items():
            tensor_at(tree, path).copy_(value)
