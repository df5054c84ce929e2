"""A tape: what a CUDA graph does, on a CPU, so that what is built on CUDA graphs can be tried anywhere.

Operators are run when they are recorded, and run again on the same tensors when the tape is played: results are written
where they were. A real recording does not run them, so a test must not rely on what recording has computed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lorafx.lowering.cuda_graphs.device import Cuda


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.before, self._own = [], [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = pytree.tree_map_only(Tensor, _memory, (args, kwargs or {}))
        if func._schema.is_mutable or "batch_norm" in func._schema.name:  # whose schema does not say so
            self._keep(given)
        found = func(*args, **(kwargs or {}))
        results = [_memory(t) for t in pytree.tree_leaves(found) if isinstance(t, Tensor)]
        own = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves(given) if isinstance(t, Tensor)}
        self._own |= {t.untyped_storage().data_ptr() for t in results} - own
        self.calls.append((func, *given, results))
        return found

    def _keep(self, given) -> None:
        """Keep the values of what an operator may write to and was there before: recording must not change it."""
        for tensor in pytree.tree_leaves(given):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self._own:
                self.before.append((tensor, tensor.clone()))

    def restore(self) -> None:
        for tensor, values in reversed(self.before):
            tensor.copy_(values)

    def play(self) -> None:
        for func, args, kwargs, results in self.calls:
            again = [t for t in pytree.tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
            for old, new in zip(results, again):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _memory(tensor: Tensor) -> Tensor:
    """The same memory by the sizes of now, which a later operator may change, and written to as kernels do: unseen."""
    return tensor.data


class TapeDevice(Cuda):
    """A device that records on tapes, and spoils what a recording has computed until it is played."""

    def holds(self, tensor: Tensor) -> bool:
        return tensor.is_cpu

    @contextmanager
    def turn(self) -> Iterator[None]:
        with self._lock:
            yield

    def record(self, body: Callable):
        with self.with_random_state(self.random_state()), Tape() as tape:
            result = body()
        tape.restore()
        return result, tape.play

    def random_state(self) -> Tensor:
        return torch.get_rng_state()

    @contextmanager
    def with_random_state(self, state: Tensor) -> Iterator[None]:
        with torch.random.fork_rng([]):
            torch.set_rng_state(state)
            yield
