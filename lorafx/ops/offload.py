"""Offloading: the inputs of a checkpointed layer wait in the host's memory until backward needs them.

Copies run on a stream of their own beside the computation. While backward is at one layer, the input of the layer
before it is on its way back (Unsloth's gradient checkpointing does so, after Ren et al., 2021, arXiv 2101.06840).
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class Waiting:
    """A tensor that leaves its device when `leave` is called, and is back, with the same bits, at the next `get`."""

    # The one that left last. Of the process: backward runs layers in the reverse order, whichever model they are of.
    last: weakref.ref[Waiting] | None = None

    def __init__(self, tensor: Tensor):
        self.here: Tensor | None = tensor
        self.requires_grad, self.device = tensor.requires_grad, tensor.device
        self.before: weakref.ref[Waiting] | None = None
        self._host: Tensor | None = None
        self._coming: tuple[Tensor, Any] | None = None

    def leave(self) -> None:
        """Start to copy the tensor to the host; its memory is free once that is done and nobody else has it."""
        assert self.here is not None
        self._host = to_host(self.here)
        self.here = None
        self.before, Waiting.last = Waiting.last, weakref.ref(self)

    def come(self) -> None:
        """Start to copy the tensor back, if it is away."""
        if self.here is None and self._coming is None and self._host is not None:
            self._coming = to_device(self._host, self.device)

    def get(self) -> Tensor:
        """The tensor. The one that left before it starts to come back now, for backward needs it next."""
        if self.here is not None:
            return self.here
        self.come()
        before = self.before() if self.before else None
        if before is not None:
            before.come()
        assert self._coming is not None
        tensor = arrived(*self._coming)
        self._coming = None
        return tensor.requires_grad_(self.requires_grad)


def offloaded(run: Any, moves: tuple[int, ...], *inputs: Any) -> Any:
    """`run(*inputs)`, which runs again in backward: its inputs alone are kept, those numbered `moves` on the host."""
    waiting = [Waiting(value) if n in moves and _can_move(value) else value for n, value in enumerate(inputs)]

    def fetched(*held: Any) -> Any:
        return run(*(value.get() if isinstance(value, Waiting) else value for value in held))

    outputs = checkpoint(fetched, *waiting, use_reentrant=False)
    for value in waiting:
        if isinstance(value, Waiting):
            value.leave()
    return outputs


def _can_move(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_cuda


@functools.cache  # one on each device, of the process
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def to_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, complete when the stream for copies has come to it."""
    stream = _stream(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(stream):
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        host.copy_(tensor.detach(), non_blocking=True)
    tensor.record_stream(stream)
    return host


def to_device(host: Tensor, device: torch.device) -> tuple[Tensor, torch.cuda.Event]:
    """A copy on the device, and the event after which it is complete."""
    with torch.cuda.stream(_stream(device)):
        return host.to(device, non_blocking=True), _stream(device).record_event()


def arrived(tensor: Tensor, ready: torch.cuda.Event) -> Tensor:
    """The copy, for the device's current stream to use."""
    stream = torch.cuda.current_stream(tensor.device)
    stream.wait_event(ready)
    tensor.record_stream(stream)
    return tensor
