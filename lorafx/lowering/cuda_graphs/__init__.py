"""CUDA graphs: calls of one kind and size are launched as one, instead of kernel by kernel from Python.

In comes what serves a kind of call, out comes a function that does the same: `replayed` decides for each call whether
it is recorded, replayed or run as it is, `recording` is one call's forward and backward, `outputs` makes a call's
output of what a replay has computed, `pool` says for whose backward memory is kept, and `device` is the thin layer over
torch.cuda.
"""

from .device import Cuda, device_of
from .replayed import Replayed

__all__ = ["Cuda", "Replayed", "device_of"]
