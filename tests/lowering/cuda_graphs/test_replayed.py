"""CUDA graphs, by tapes on a CPU: a replayed call is the call, bit by bit, and what cannot be replayed is not."""

import gc

import pytest
import torch
from graphs import adapted
from models import llama
from tape import TapeDevice
from torch import nn
from transformers import DynamicCache, StaticCache

import lorafx
from lorafx.lowering import lower
from lorafx.lowering.backend import Backend
from lorafx.ops.deferral import Deferred


@pytest.fixture(autouse=True)
def taped(monkeypatch):
    """Every graph can be recorded, on a tape."""
    monkeypatch.setattr(lower, "device_of", lambda gm: torch.device("cpu"))
    monkeypatch.setattr(lower, "Cuda", TapeDevice)
