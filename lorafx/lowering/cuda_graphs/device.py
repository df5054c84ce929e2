"""Device: what records kernels instead of running them, and launches them again."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from ...torch_private.cuda import end_pool
from .pool import Pool

T = TypeVar("T")


class Cuda:
    """Records on one CUDA device. What its recordings compute lies in one pool of memory, which they share."""

    def __init__(self, device: torch.device):
        self.device, self.pool = device, Pool()
        self._memory: Any = None
        self._stream: Any = None
        self._recordings: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._failed: list[torch.cuda.CUDAGraph] = []
        self._lock = threading.RLock()
        self._last: Any = None  # the stream that used the recordings last

    def holds(self, tensor: Tensor) -> bool:
        """Whether kernels on this device read a tensor where it is."""
        return tensor.device == self.device

    @contextmanager
    def turn(self) -> Iterator[None]:
        """While nobody else uses the recordings: threads wait for each other, and streams on the device too."""
        with self._lock:
            stream = torch.cuda.current_stream(self.device)
            if self._last not in (None, stream):
                stream.wait_stream(self._last)
            self._last = stream
            yield

    def record(self, body: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """What `body` gives, its kernels recorded and not run, and a function that launches them."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            if not self._recordings:  # torch takes a pool back with the last recording in it
                self._memory, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)
            try:
                # Other threads, as those of data loaders, may use the device meanwhile.
                with torch.cuda.graph(graph, self._memory, self._stream, capture_error_mode="thread_local"):
                    result = body()
            except BaseException:
                self._end_failed(graph)
                raise
        self._recordings.add(graph)
        return result, graph.replay

    def _end_failed(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a recording that torch could not end: or else no random number could be drawn, and memory not freed.

        The device's allocator is told, and the random numbers' generator is by another recording, of one kernel.
        """
        self._failed.append(graph)  # the allocator may still ask it
        with suppress(RuntimeError):  # there was nothing left to end
            end_pool(self.device, self._memory)
        one = torch.zeros(1, device=self.device)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self._stream, capture_error_mode="thread_local"):
            one.add_(1)

    def random_state(self) -> Tensor:
        """The state of the device's random numbers."""
        return torch.cuda.get_rng_state(self.device)

    @contextmanager
    def with_random_state(self, state: Tensor) -> Iterator[None]:
        """Draw from this state inside, and go on outside as if nothing had been drawn."""
        with torch.random.fork_rng([self.device]):
            torch.cuda.set_rng_state(state, self.device)
            yield


def device_of(gm: GraphModule) -> torch.device | None:
    """The device that a graph can be recorded on: the one CUDA device that has all its parameters, or None."""
    devices = {parameter.device for parameter in gm.parameters()}
    found = next(iter(devices), None)
    return found if found is not None and len(devices) == 1 and found.type == "cuda" else None
