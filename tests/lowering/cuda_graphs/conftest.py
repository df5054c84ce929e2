import pytest
import torch
from tape import TapeDevice

from lorafx.lowering import lower


@pytest.fixture(autouse=True)
def taped(monkeypatch):
    """Without a GPU every graph can be recorded, on a tape."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(lower, "device_of", lambda gm: torch.device("cpu"))
        monkeypatch.setattr(lower, "Cuda", TapeDevice)
