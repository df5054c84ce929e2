"""Operators that passes may write and ATen lacks, as `torch.ops.lorafx.…`; each is one file with its reference."""

from .attention import attention
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .lora_linear import lora_linear
from .lora_linears import lora_linears
from .rms_norm import rms_norm
from .rotary import rotary

__all__ = ["attention", "linear", "linear_cross_entropy", "lora_linear", "lora_linears", "rms_norm", "rotary"]
