"""Modes that a call runs in: autocast, gradients, inference, recording, and what torch takes for given."""

from __future__ import annotations

import contextlib
import functools

import torch

Defaults = tuple[torch.dtype, torch.device, bool]


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast runs matrix products in on this device now; None where it is off or unknown."""
    if not _has_autocast(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


_has_autocast = functools.cache(torch.amp.is_autocast_available)  # each site asks in each call


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """Autocast switched off inside, where it is on. To switch takes as long as a small product, so nothing else is."""
    is_on = _has_autocast(device_type) and torch.is_autocast_enabled(device_type)  # the meta device has none
    return torch.autocast(device_type, enabled=False) if is_on else contextlib.nullcontext()


def is_recorded() -> bool:
    """Whether a CUDA graph is being recorded, so that nothing may be read from the device."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def modes() -> tuple[bool, bool, tuple[torch.dtype | None, ...], Defaults]:
    """The gradient mode, inference mode, autocast's dtype on each kind of device there is, and torch's defaults."""
    dtypes = tuple([autocast_dtype(device) for device in _devices()])
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), dtypes, defaults()


def defaults() -> Defaults:
    """What torch takes where a model does not say: dtype and device of new tensors, and whether to be deterministic."""
    return torch.get_default_dtype(), torch.get_default_device(), torch.are_deterministic_algorithms_enabled()


def _devices() -> tuple[str, ...]:
    return ("cpu",) if (found := accelerator()) is None else ("cpu", found)


@functools.cache  # the machine stays the same
def accelerator() -> str | None:
    """The kind of device that this machine has besides its CPU, as "cuda"; None if it has none."""
    found = torch.accelerator.current_accelerator()
    return found.type if found else None
