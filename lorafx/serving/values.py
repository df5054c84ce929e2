"""Values: an adapted parameter with its updates in it, W + ΔW, for functions of which no reading knows what they do.

    f(…, W, …)  ->  f(…, W + ΔW, …)

That is right for whatever function reads a parameter that a config names, in values and in gradients. It takes as much
memory as the parameter, so what a reading knows how to compute without goes first. W + ΔW is made once in each run of a
module, as PEFT makes it, and gone with that: what is run again in backward makes its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..capture.frames import running_line
from ..errors import UncoveredOperatorError
from ..ops.modes import modes
from ..torch_private.tensors import version_of
from .direct import Direct
from .methods import is_setter, reads_memory


class _Value(NamedTuple):
    tensor: Tensor
    version: int | None  # None where torch does not count, as in inference mode
    weight: str
    depth: int

    def require_unwritten(self) -> None:
        """Raise `UncoveredOperatorError` if somebody has written to it: the parameter would not know."""
        if self.version is not None and version_of(self.tensor) != self.version:
            raise UncoveredOperatorError(
                f"{self.weight} is written to while a call runs and an adapter acts on it{running_line()}"
            )


class Values:
    """The values that the modules which run now have read. `direct` computes them; without it there are none."""

    def __init__(self, direct: Direct | None) -> None:
        self.direct = direct
        self.kept: dict[tuple[Any, ...], _Value] = {}

    def given_to(
        self,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        weights: Mapping[int, str],
        parts: Sequence[str],
        copy_of: Callable[[Any], Any],
    ) -> Any:
        """What a function gives when it is given values in the place of the `weights`, whose paths are by id.

        `parts` are the modules that run, the innermost last. NotImplemented if one of the weights has no value.
        """
        if self.direct is None or is_setter(func) or reads_memory(func):
            return NotImplemented
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        read = {id(leaf): self._of(weights[id(leaf)], leaf, parts) for leaf in leaves if id(leaf) in weights}
        if any(each is NotImplemented for each in read.values()):
            return NotImplemented
        given = [read[id(leaf)].tensor if id(leaf) in read else copy_of(leaf) for leaf in leaves]
        args, kwargs = spec.unflatten(given)
        result = func(*args, **kwargs)
        for each in read.values():
            each.require_unwritten()
        return result

    def _of(self, weight: str, tensor: Tensor, parts: Sequence[str]) -> Any:
        key = len(parts), weight, id(tensor), _version(tensor), modes()
        if key not in self.kept:
            assert self.direct is not None
            found = self.direct.value(weight, parts[-1], tensor)
            if found is NotImplemented:
                return NotImplemented
            self.kept[key] = _Value(found, _version(found), weight, len(parts))
        return self.kept[key]

    def drop(self, depth: int) -> None:
        """Forget what a module has read that has run, with `depth - 1` around it.

        Raises `UncoveredOperatorError` if it wrote to that.
        """
        gone = [key for key, each in self.kept.items() if each.depth == depth]
        for each in [self.kept.pop(key) for key in gone]:
            each.require_unwritten()


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else version_of(tensor)


def is_worth(func: Callable[..., Any], args: Sequence[Any]) -> bool:
    """Whether a function takes so much of a stacked parameter by number that its value costs no more.

    With gradients, nearly all experts have tokens; without, as where a model decodes, few have.
    """
    if func is not Tensor.__getitem__ or torch.is_grad_enabled():
        return func is Tensor.__getitem__
    stack, index = args
    return isinstance(index, Tensor) and index.numel() >= len(stack)
