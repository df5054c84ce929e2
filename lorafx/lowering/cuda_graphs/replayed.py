"""Replayed: each call of a lowered graph is run as it is, recorded, or replayed."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ...graph.blocks import checkpoint_block, offload_block
from ...graph.effects import written_inputs
from ...ops.calls import by_reference
from ...ops.modes import is_recorded
from ...torch_private.tensors import moves_saved_tensors
from .device import Cuda
from .recording import ModelTensors, Recording, Run, why_not

_MOST = 8  # recordings of one kind of call: each keeps its arguments' and outputs' memory
_TRIES = 64  # sets of sizes that are watched for one that comes again
_WORTH = 3  # replays for each recording that was made, for recording takes longer than a call


@dataclass
class Calls:
    """The calls of one set of sizes so far."""

    ran: bool = False  # as it is, so that all is compiled that it needs
    had_backward: bool = False
    recording: Recording | None = None


class Replayed:
    """Runs a lowered graph; does so by replaying a recording where a call is like one before.

    The first call of each set of sizes is run as it is, with its backward: then all is compiled that it needs. The
    second is recorded. A call is run as it is, too, while another one waits for its backward, and where it cannot be
    recorded, for the `reason`.
    """

    def __init__(self, run: Run, gm: GraphModule, device: Cuda):
        self._run, self._gm, self._device = run, gm, device
        self._calls: dict[Any, Calls] = {}
        self._written, targets = written_inputs(gm), {node.target for node in gm.graph.nodes}
        self._recomputes = checkpoint_block in targets
        self.replays = self.recordings = 0
        self.reason = "not recorded: layers' inputs wait in the host's memory" if offload_block in targets else ""

    def __str__(self) -> str:
        return self.reason or f"{self.replays} replayed"

    def __call__(self, *leaves: Any) -> Sequence[Any]:
        with self._device.turn():  # calls that run as they are, too: what is recorded elsewhere has others' parameters
            calls = self._of_size(leaves) if not self.reason and self._may_replay(leaves) else None
            recording = calls and self._recording(calls, list(leaves))
            if recording:
                self.replays += 1
                return recording.replay(list(leaves))
            return self._watched(calls, leaves) if calls else self._run(*leaves)

    def _may_replay(self, leaves: Sequence[Any]) -> bool:
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not all(map(self._device.holds, tensors)):
            self.reason = f"not recorded: an argument is not on {self._device.device}"
        others = by_reference() or moves_saved_tensors() or is_recorded()
        return not self.reason and not others and self._device.pool.is_free()

    def _of_size(self, leaves: Sequence[Any]) -> Calls | None:
        sizes = tuple([_size(leaf) for leaf in leaves])
        calls = self._calls.get(sizes)
        if calls is None and len(self._calls) >= _TRIES:
            recorded = [key for key, each in self._calls.items() if each.recording]
            if not recorded:
                self.reason = f"not recorded: {_TRIES} calls had {_TRIES} different sizes"
                return None
            self._calls = {key: self._calls[key] for key in recorded}
        return self._calls.setdefault(sizes, calls or Calls())

    def _recording(self, calls: Calls, leaves: list[Any]) -> Recording | None:
        """The recording of such calls, made now if one has run before; None where it is too early, or cannot be had."""
        found = calls.recording
        if found is not None and (found.failed or not found.fits(leaves)):
            self.reason, calls.recording, calls.ran = found.failed, None, False
            if not self.reason and self.recordings >= _TRIES // 4 and self.replays < _WORTH * self.recordings:
                self.reason = "not recorded: parameters, or arguments that are written to, keep being replaced"
        waits = torch.is_grad_enabled() and not calls.had_backward
        full = sum(each.recording is not None for each in self._calls.values()) >= _MOST
        if calls.recording is None and calls.ran and not (waits or full or self.reason):
            self.recordings += 1
            try:
                calls.recording = Recording(self._device, self._run, ModelTensors(self._gm), leaves, self._written)
            except Exception as error:
                self.reason = why_not(error)
        return calls.recording

    def _watched(self, calls: Calls, leaves: Sequence[Any]) -> Sequence[Any]:
        """Run a call as it is, and see whether its backward comes, and whether it draws random numbers."""
        random, found = self._device.random_state(), self._run(*leaves)
        if self._recomputes and not torch.equal(random, self._device.random_state()):
            self.reason = "not recorded: checkpointed layers draw random numbers, and the same ones again in backward"
        histories = [value.grad_fn for value in found if isinstance(value, Tensor) and value.grad_fn is not None]
        calls.ran, calls.had_backward = True, calls.had_backward or not histories
        own = weakref.ref(calls)
        for history in histories:
            history.register_prehook(lambda _: _note_backward(own))
        return found


def _size(leaf: Any) -> Any:
    """What may differ between calls of one kind: a tensor's shape, or a number."""
    return leaf.shape if isinstance(leaf, Tensor) else leaf if type(leaf) in (int, float) else None


def _note_backward(own: weakref.ref[Calls]) -> None:
    calls = own()
    if calls is not None:
        calls.had_backward = True
