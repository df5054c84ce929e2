"""What torch.cuda keeps to itself of memory for CUDA graphs."""

from __future__ import annotations

from typing import Any

import torch


def end_pool(device: torch.device, pool: Any) -> None:
    """Let memory be taken from elsewhere than a CUDA graph's pool again, after a recording that failed.

    Raises RuntimeError where none is being taken from it. Without it, memory that streams share would never be freed.
    """
    torch._C._cuda_endAllocateToPool(device.index, pool)  # type: ignore[attr-defined]
    torch._C._cuda_releasePool(device.index, pool)  # type: ignore[attr-defined]
