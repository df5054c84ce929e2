"""Attached tensors: hang an adapter's tensors into a module tree, and tell them from the model's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import is_
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..torch_private.tensors import buffers_of_no_state_dict
from .hooks import RUNNING
from .lookup import Ways
from .wrappers import innermost

ATTACHED = "_lorafx_attached"  # on a module: the names of the children that `attach` made below it
KEPT = "_lorafx_kept"  # on an attached module on the meta device: its buffers as they were before, by name


class Attached(nn.Module):
    """A module that `attach` makes. Its buffers that no state dict has, as scales, survive a device without memory.

    `model.to("meta")` drops all values, and `to_empty` gives tensors that hold anything; a state dict then brings the
    values of the others, into such tensors or in their place (`load_state_dict(assign=True)`).

    What it has of an adapter is found by the adapter's name, as in PEFT's dicts: `q_proj.lora_A["default"]`.
    """

    replaced: ClassVar[int] = 0  # how often a module was taken out of any of these by others, or gave way to another

    def __init__(self) -> None:
        super().__init__()
        vars(self)["_modules"] = Children()

    def __getitem__(self, name: str) -> Any:
        return self._held()[name]

    def __contains__(self, name: object) -> bool:
        return name in self._held()

    def __iter__(self) -> Iterator[str]:
        return iter(self._held())

    def _held(self) -> dict[str, Any]:
        return {**self._modules, **self._parameters, **self._buffers}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = buffers_of_no_state_dict(self)
        super()._apply(fn, recurse)
        kept = self.__dict__.pop(KEPT, {})
        kept |= {name: buffer for name, buffer in before.items() if buffer is not None and not buffer.is_meta}
        for name, value in kept.items():
            now = self._buffers.get(name)
            if now is not None and now.is_meta:
                self.__dict__.setdefault(KEPT, {})[name] = value
            elif now is not None and now is not value:
                with torch.no_grad():
                    now.copy_(value)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if local_metadata.get("assign_to_params_buffers"):  # tensors with memory take the place of those without
            self._buffers.update(self.__dict__.pop(KEPT, {}))


class Children(dict[str, Any]):
    """The `_modules` of an `Attached`, which some write to themselves: it counts what is replaced in it."""

    def __setitem__(self, name: str, module: nn.Module | None) -> None:
        Attached.replaced += self.get(name, module) is not module
        super().__setitem__(name, module)


def _counting(name: str) -> Callable[..., Any]:
    """The method of this name that dicts have, which is taken to replace a module."""

    def method(self: Children, *args: Any, **kwargs: Any) -> Any:
        Attached.replaced += 1
        return getattr(dict, name)(self, *args, **kwargs)

    return method


for _name in ("__delitem__", "__ior__", "clear", "pop", "popitem", "update"):
    setattr(Children, _name, _counting(_name))


class Siblings(dict[str, Any]):
    """The `_modules` of a module that has attached children beside its own: its own Python goes through its own alone.

    A container that runs whatever children it has would take an adapter's tensors, or copies of layers, for layers.
    """

    def _own(self) -> dict[str, Any]:
        return {name: self[name] for name in dict.__iter__(self) if not isinstance(self[name], Attached)}

    def __iter__(self) -> Iterator[str]:
        return dict.__iter__(self) if RUNNING.mode is None else iter(self._own())

    def __reversed__(self) -> Iterator[str]:
        return dict.__reversed__(self) if RUNNING.mode is None else reversed(self._own())

    def __len__(self) -> int:
        return dict.__len__(self) if RUNNING.mode is None else len(self._own())

    def keys(self) -> Any:
        return dict.keys(self) if RUNNING.mode is None else self._own().keys()

    def values(self) -> Any:
        return dict.values(self) if RUNNING.mode is None else self._own().values()

    def items(self) -> Any:
        return dict.items(self) if RUNNING.mode is None else self._own().items()


def attach(root: nn.Module, path: str, tensor: Tensor, persistent: bool = False) -> nn.Module:
    """Hang a tensor at `path`: a parameter, or a buffer, which is part of the `state_dict` if `persistent`.

    Modules that are missing on the way are made, and remembered as attached. Returns the one that has the tensor.
    """
    *parents, last = path.split(".")
    owner = _made(root, parents)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(last, tensor)
    else:
        owner.register_buffer(last, tensor, persistent=persistent)
    return owner


def attach_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Hang a module that `attach` made at one more path.

    What several modules share is one module below all of them: then a move of the model moves it once, and leaves it
    shared, which it would not with buffers.
    """
    *parents, last = path.split(".")
    _add(_made(root, parents), last, module)


def _made(root: nn.Module, atoms: Iterable[str]) -> nn.Module:
    """The module on the way from `root` by these names; those that are missing are made."""
    owner = root
    for atom in atoms:
        if atom not in owner._modules:
            _add(owner, atom, Attached().train(owner.training))
        owner = owner.get_submodule(atom)
    return owner


def _add(owner: nn.Module, atom: str, module: nn.Module) -> None:
    owner.add_module(atom, module)
    if own_children(owner) and type(owner._modules) is dict:
        owner.__dict__["_modules"] = Siblings(owner._modules)  # who watches the dict before sees the child in it, too
    owner.__dict__[ATTACHED] = (*vars(owner).get(ATTACHED, ()), atom)


def detach(root: nn.Module, paths: Iterable[str]) -> None:
    """Take tensors away again, and the modules that `attach` made for them once they are empty.

    A path that leads nowhere is skipped: its module may have been replaced or removed since.
    """
    for path in paths:
        owners, atoms = [root], path.split(".")
        for atom in atoms[:-1]:
            if isinstance(inner := getattr(owners[-1], atom, None), nn.Module):
                owners.append(inner)
        if len(owners) < len(atoms):
            continue
        if isinstance(getattr(owners[-1], atoms[-1], None), Tensor):  # gone already if its module is at other paths too
            delattr(owners[-1], atoms[-1])
        for owner, child, atom in reversed(list(zip(owners, owners[1:], atoms))):
            if atom in vars(owner).get(ATTACHED, ()) and not (child._modules or child._parameters or child._buffers):
                dict.__delitem__(owner._modules, atom)  # uncounted: it goes with all that was kept of its adapter
                owner.__dict__[ATTACHED] = tuple(a for a in vars(owner)[ATTACHED] if a != atom)


def own_children(module: nn.Module) -> list[nn.Module]:
    """The children of a module, without those that `attach` made."""
    attached = vars(module).get(ATTACHED, ())
    return [child for name, child in module._modules.items() if child is not None and name not in attached]


def own_modules(root: nn.Module) -> Iterator[nn.Module]:
    """The modules of a tree, each once, without those that `attach` made."""
    seen: set[int] = set()
    pending = [root]
    while pending:
        module = pending.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield module
            pending.extend(own_children(module))


def named_own_modules(root: nn.Module, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """The same as `named_modules` has them, by their first path and in its order.

    There may be thousands of adapters, each with modules of its own at every site.
    """
    seen = set() if seen is None else seen
    if id(root) in seen:
        return
    seen.add(id(root))
    yield path, root
    attached = vars(root).get(ATTACHED, ())
    for name, child in root._modules.items():
        if child is not None and name not in attached:
            yield from named_own_modules(child, f"{path}.{name}" if path else name, seen)


def attached_modules(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The modules that `attach` made below these, at any depth, each as often as it hangs somewhere."""
    pending = [module._modules.get(name) for module in modules for name in vars(module).get(ATTACHED, ())]
    while pending:
        if (module := pending.pop()) is not None:
            yield module
            pending.extend(module._modules.values())


def has_copies_among_children(module: nn.Module) -> bool:
    """Whether `attach` made children of a module that has its own too: a container in `modules_to_save`, say."""
    return bool(vars(module).get(ATTACHED)) and bool(own_children(module))


def branch(root: nn.Module, owners: Iterable[str]) -> nn.Module:
    """A new tree of empty modules that holds the modules of `root` at the paths `owners`, shared and not copied.

    What somebody has wrapped since is held as it is within its wrapper.
    """
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
        inner._modules.setdefault(last, innermost(root.get_submodule(path)))
    return bare


def trained_paths(root: nn.Module) -> frozenset[str]:
    """Paths of the base's own parameters that require gradients."""
    own = {id(module) for module in own_modules(root)}
    return frozenset(
        f"{path}.{name}".lstrip(".")
        for path, module in root.named_modules(remove_duplicate=False)
        if id(module) in own
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    )


class Parents:
    """Modules of a model's own that some ways lead through: whether they have the children that they had."""

    def __init__(self, ways: Ways, modules: Sequence[Any]):
        """`modules` are those on the ways, as `ways.modules` gives them."""
        steps = [(modules[parent], atom, child) for (parent, atom), child in zip(ways.children, modules[1:])]
        inner = [step for step in steps if isinstance(step[0], nn.Module)]
        direct = [step for step in inner if step[0]._modules.get(step[1]) is step[2]]
        own = dict.fromkeys(step[0] for step in direct if not isinstance(step[0], Attached))
        self.are_bare = len(direct) == len(inner)  # none of them is somebody's wrapper, which may give others each time
        self._parents = [parent._modules for parent in own]
        self._children = [children.copy() for children in self._parents]
        self._replaced = Attached.replaced  # modules that `attach` made count what is replaced in them

    @property
    def are_in_place(self) -> bool:
        """Whether the modules on the ways are those that were there before, wrappers aside."""
        return self._replaced == Attached.replaced and self._parents == self._children

    def are_like(self, others: Parents) -> bool:
        """Whether they are the same modules as others."""
        same = len(self._parents) == len(others._parents) and all(map(is_, self._parents, others._parents))
        return same and self.are_bare == others.are_bare


class Held:
    """What holds an adapter's tensors in a tree, for who asks again and again: the ways there are walked once.

    They are to be walked anew when `parents` are no longer in place, or not bare. Adapters at the same sites have these
    in common, and who switches looks at them once: `known` are those of others, which are in place.
    """

    def __init__(self, root: nn.Module, ways: Ways, known: Iterable[Parents] = ()):
        self.root, self.ways = root, ways
        modules = ways.modules(root)
        own = Parents(ways, modules)
        self.parents = next(filter(own.are_like, known), own)
        self._owners: dict[str, list[dict[str, Any]]] = {}  # by the name that the tensor has there
        for owner, name in ways.ends:
            self._owners.setdefault(name, []).append(getattr(modules[owner], "_parameters", {}))

    def set_trainable(self, trains: bool) -> None:
        """Set or clear `requires_grad` on the adapter's parameters, wherever they are now; buffers never train."""
        try:
            # To ask first whether it differs, or what class it has, takes a fifth of the time each.
            for name, owners in self._owners.items():
                for own in owners:
                    own[name].requires_grad = trains
        except (KeyError, AttributeError):  # some are buffers, or for the moment no parameters, as in FSDP1
            set_trainable(self.ways.tensors(self.root), trains)


def set_trainable(tensors: Iterable[Tensor | None], trains: bool) -> None:
    """Set or clear `requires_grad` on the parameters among these; buffers never train."""
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad != trains:
            # To ask `isinstance` of a parameter takes longer than all else.
            tensor.requires_grad = trains and (type(tensor) is nn.Parameter or isinstance(tensor, nn.Parameter))
