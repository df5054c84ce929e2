"""The whole process: what is put in the place of torch's and Python's own functions once there is an adapted model.

A model's own Python may leave the call that it runs in: it checkpoints a layer, has a thread run one, or calls a
function of TorchScript. What comes of that must find its way back to the adapters of the call, whoever runs it then.
"""

from __future__ import annotations

import functools
import threading

from ..torch_private.replacing import checkpoints_replaced, scripts_replaced, threads_replaced
from .checkpointing import as_served_now
from .scripts import run_script

_LOCK = threading.Lock()


def prepare_process() -> None:
    """Have what leaves a call of an adapted model find its way back. Once in a process is enough."""
    with _LOCK:
        _prepare_once()


@functools.cache
def _prepare_once() -> None:
    checkpoints_replaced(as_served_now)
    threads_replaced(as_served_now)
    scripts_replaced(run_script)
