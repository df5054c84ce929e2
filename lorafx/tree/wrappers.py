"""Wrappers: what torch.compile, accelerate and data parallelism put around modules is taken off a mirror.

A mirror is the bare model: what is captured and compiled is the rewritten graph, under the bare model's names. What a
wrapper does to a call besides compiling it stays: accelerate's hooks become hooks of torch's, on the mirror.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from types import MethodType
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..errors import AdapterError
from ..torch_private.compilers import compiled_module, is_of_compiled_modules, uncompiled
from ..torch_private.tensors import call_hooks

# What accelerate adds to a module: its hook, the forward below it, and methods that refuse to move a dispatched model.
HOOK, BELOW = "_hf_hook", "_old_forward"
_GUARDED = ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa")


def unwrapped(model: nn.Module) -> nn.Module:
    """The module within wrappers that only have it compiled, or would share its work with nobody.

    Raises `AdapterError` for one that does share it: adapters that are added inside would train in each process apart.
    """
    while (inner := _inner(model)) is not None:
        if _shares_work(model):
            raise AdapterError(
                f"the base is wrapped in {type(model).__name__}, which would not see the adapter's parameters: adapt "
                "the model first (it is the wrapper's `module`), and wrap what comes out"
            )
        model = inner
    return model


def innermost(model: nn.Module) -> nn.Module:
    """The module within all wrappers, which somebody may have put around a part of an adapted model."""
    while (inner := _inner(model)) is not None:
        model = inner
    return model


def _inner(model: nn.Module) -> nn.Module | None:
    """What a wrapper is around; None if the module is no wrapper."""
    if not _are_wrappers(type(model)):  # type: ignore[arg-type]
        return None
    return model.module if (inner := compiled_module(model)) is None else inner  # type: ignore[return-value]


@functools.cache  # calls ask of hundreds of modules, and of an abstract class, as DDP's, that takes a while
def _are_wrappers(kind: type[nn.Module]) -> bool:
    parallel = issubclass(kind, (DataParallel, DistributedDataParallel))
    return parallel or is_of_compiled_modules(kind) or _is_of_fsdp1(kind)


def _shares_work(model: nn.Module) -> bool:
    """Whether a wrapper divides batches or parameters among several devices or processes."""
    if isinstance(model, DataParallel):
        return len(model.device_ids) > 1
    if isinstance(model, DistributedDataParallel):
        return model.process_group.size() > 1  # type: ignore[no-any-return]
    return is_fsdp1(model)


def is_fsdp1(model: nn.Module) -> bool:
    """Whether this is torch's FullyShardedDataParallel, within which parameters are whole only while it runs."""
    return _is_of_fsdp1(type(model))


def _is_of_fsdp1(kind: type[nn.Module]) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and issubclass(kind, fsdp.FullyShardedDataParallel)


def side_by_side(
    base: nn.Module, tree: nn.Module, seen: set[int] | None = None
) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The modules of a base within its wrappers, each with its mirror, as far as the tree still has both."""
    base, seen = unwrapped(base), set() if seen is None else seen
    if id(base) in seen:
        return
    seen.add(id(base))
    yield base, tree
    for name, child in base._modules.items():
        mirrored = tree._modules.get(name)
        if child is not None and mirrored is not None:
            yield from side_by_side(child, mirrored, seen)


def unwrap_forward(copy: nn.Module, original: nn.Module) -> None:
    """Take off a mirror what its original has around its forward, and what it has compiled of itself."""
    attributes = copy.__dict__
    attributes.pop("_compiled_call_impl", None)
    hook = attributes.pop(HOOK, None)
    if BELOW in attributes:
        attributes["forward"] = attributes.pop(BELOW)
    for name in _GUARDED if "hf_device_map" in attributes else ():
        attributes.pop(name, None)
    for name, value in attributes.items():
        attributes[name] = uncompiled(value)
    of_class = type(copy).forward
    if "forward" not in attributes and uncompiled(of_class) is not of_class:
        attributes["forward"] = MethodType(uncompiled(of_class), original)
    elif _is_method_of(attributes.get("forward"), original):
        del attributes["forward"]
    if hook is not None:
        _hang(copy, AcceleratesHook(hook, original))


def _is_method_of(forward: Any, module: nn.Module) -> bool:
    """Whether a module's own `forward` is nothing but the bound method that it has without it."""
    return getattr(forward, "__self__", None) is module and forward.__func__ is type(module).forward


class AcceleratesHook:
    """A hook of accelerate's, for a mirror: it acts on the original, which has the same tensors and no adapters.

    One that only moves arguments to a device is accelerate's in name, so that it becomes part of a graph. All others,
    as those that load weights for the time of a call, expect to be called each time.
    """

    def __init__(self, hook: Any, original: nn.Module):
        if hook.no_grad:
            raise AdapterError(
                f"{type(hook).__name__} runs {type(original).__name__} without gradients: remove it first"
            )
        self.hook, self.original = hook, original
        if all(_only_moves(each) for each in getattr(hook, "hooks", [hook])):
            self.__module__ = type(hook).__module__

    @property
    def device(self) -> Any:
        """Where weights are while the module's forward runs; None if the hook leaves them where they are."""
        hooks = getattr(self.hook, "hooks", [self.hook])
        return next((each.execution_device for each in hooks if getattr(each, "offload", False)), None)

    def __call__(self, _: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        """Before forward, of `(args, kwargs)`; after it, of `(args, kwargs, output)`."""
        if len(rest) == 1:
            return self.hook.pre_forward(self.original, *args, **rest[0])
        return self.hook.post_forward(self.original, rest[-1])


def _only_moves(hook: Any) -> bool:
    return type(hook).__name__ == "AlignDevicesHook" and not hook.offload


def _hang(copy: nn.Module, hook: AcceleratesHook) -> None:
    """Call it outside of all hooks of torch's that the module has, as accelerate does of its `forward`."""
    copy.register_forward_pre_hook(hook, with_kwargs=True)
    copy.register_forward_hook(hook, with_kwargs=True)


def loading_device(module: nn.Module) -> Any:
    """Where a module has its weights during a call, if accelerate keeps them elsewhere between calls; else None."""
    hooks = [hook for hooks in call_hooks(module) for hook in hooks.values() if isinstance(hook, AcceleratesHook)]
    return next((hook.device for hook in hooks if hook.device is not None), None)
