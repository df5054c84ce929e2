"""PEFT's LoftQ computes on a GPU, whatever there is; this has it compute on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class OnCpu(TorchFunctionMode):
    """Within it, functions of torch that are told "cuda" do what they do on the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {name: _here(value) for name, value in (kwargs or {}).items()}
        return function(*map(_here, args), **given)


def _here(value: Any) -> Any:
    named = isinstance(value, (str, torch.device)) and str(value).partition(":")[0] == "cuda"
    return "cpu" if named else value
