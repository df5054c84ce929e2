"""Before: how all was that a call may change, to be put back where the call has to run once more.

A call, or a part of one, may turn out to need a graph when its own Python has run half way. Then a model that counts,
draws random numbers or fills a cache must be as though nothing had run.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..capture.written_arguments import changed, contents, given, pour
from ..errors import UncoveredOperatorError
from ..torch_private.tensors import version_of
from ..tree.attached import own_modules
from .call_key import Call
from .tree_state import TreeGuards


class RunAgain(UncoveredOperatorError):
    """A part of a call needs a graph, and has changed something: the whole call starts anew, as though it never ran."""


class RandomNumbers(NamedTuple):
    """Which random numbers would be drawn next, from torch, Python and numpy."""

    torchs: Tensor
    on_devices: tuple[Tensor, ...]
    pythons: Any
    numpys: Any

    @classmethod
    def of_now(cls) -> RandomNumbers:
        """As it is now."""
        on_devices = tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else ()
        return cls(torch.get_rng_state(), on_devices, random.getstate(), numpy.random.get_state())

    def put_back(self) -> None:
        """Have the same be drawn again."""
        torch.set_rng_state(self.torchs)
        if self.on_devices:
            torch.cuda.set_rng_state_all(list(self.on_devices))
        random.setstate(self.pythons)
        numpy.random.set_state(self.numpys)


class Before(NamedTuple):
    """What a call may change, as it was before, to be put back.

    That is what its arguments hold, what the model holds in buffers and in attributes at any depth, and random numbers.
    """

    containers: Mapping[str, Any]
    held: Mapping[str, tuple[list[Any], pytree.TreeSpec]]
    random: RandomNumbers
    tensors: tuple[tuple[Tensor, Tensor], ...]  # each with a copy
    put_back_tree: Callable[[], None]

    @classmethod
    def of(cls, call: Call, tree: TreeGuards) -> Before:
        """As it is now, in a tree that was looked at for this call."""
        containers = given(call.args, call.kwargs)
        of_tree, put_back_tree = tree.noted()
        written = [each for each in (*of_tree, *call.leaves) if isinstance(each, Tensor) and not each.requires_grad]
        copies = tuple((each, each.detach().clone()) for each in written if not each.is_meta)
        return cls(containers, contents(containers), RandomNumbers.of_now(), copies, put_back_tree)

    def put_back(self, error: BaseException) -> None:
        """Make it so again. `error` is what the call has ended in: nothing is left of what it was doing."""
        _end(error)
        for name, container in changed(self.containers, self.held).items():
            leaves, spec = self.held[name]
            pour(container, spec.unflatten(leaves))
        self.put_back_tree()
        with torch.no_grad():
            for tensor, copy in self.tensors:
                if not torch.equal(tensor, copy):
                    tensor.copy_(copy)
        self.random.put_back()


class Touched(NamedTuple):
    """Which buffers and arguments a part of a call has, and how often these were written to: cheap to ask.

    A part that changes anything else cannot be a graph, and says so.
    """

    module: nn.Module
    containers: Mapping[str, Any]
    held: Mapping[str, tuple[list[Any], pytree.TreeSpec]]
    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]
    random: RandomNumbers

    @classmethod
    def of(cls, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Touched:
        """As it is now."""
        containers = given(args, kwargs)
        leaves = [*_buffers(module), *pytree.tree_leaves((args, kwargs))]
        tensors = tuple(each for each in leaves if isinstance(each, Tensor) and not each.is_inference())
        versions = tuple(map(version_of, tensors))
        return cls(module, containers, contents(containers), tensors, versions, RandomNumbers.of_now())

    def put_back(self, error: Exception) -> None:
        """Have the same random numbers be drawn again. Raises `RunAgain` if something else was changed since.

        `error` is what the part has ended in.
        """
        self.random.put_back()
        known = set(map(id, self.tensors))
        replaced = any(id(each) not in known for each in _buffers(self.module))
        if replaced or tuple(map(version_of, self.tensors)) != self.versions or changed(self.containers, self.held):
            raise RunAgain(str(error)) from error


def _end(error: BaseException) -> None:
    """End what waits in the frames of a call that has failed.

    torch's checkpoint has its hooks on saved tensors in place as long as its frame lives, as it does with the error,
    and would take what the next run saves for its own.
    """
    ended: BaseException | None = error
    while ended is not None:
        traceback.clear_frames(ended.__traceback__)
        for frame, _ in traceback.walk_tb(ended.__traceback__):
            len(frame.f_locals)  # where somebody has asked for these before, this makes the same dict anew
        ended = ended.__cause__ or ended.__context__


def _buffers(module: nn.Module) -> list[Tensor]:
    every = (each for part in own_modules(module) for each in part._buffers.values())
    return [each for each in every if each is not None and not each.is_inference()]
