"""Operators that passes may write and ATen lacks, as `torch.ops.lorafx.…`.

In come tensors; out come what the equation at the top of an operator's file says and, where a gradient is wanted, a
backward of its own. Each operator is a file: the equation in torch's operators (`reference`), the formulas that run
instead, and the function that chooses between them, which is what `lorafx.ops` exports. `library` makes operators of
functions; `calls`, `dtypes` and `modes` answer what operators ask; `cpu/` has what is for one kind of CPU.
`dropout` is a part of `lora_linear`, `float8` of those that begin so, `deferral` and `offload` are values that wait.
"""

from .attention import attention
from .circulant_linear import circulant_linear
from .float8 import from_float8
from .float8_linear import float8_linear
from .float8_lora_linears import float8_lora_linears
from .fourier_linear import fourier_linear
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .lora_by_row import is_of_row, lora_by_row
from .lora_linear import lora_linear
from .lora_linears import lora_linears
from .own_lora_linears import own_lora_linear, own_lora_linears
from .rms_norm import rms_norm
from .rotary import rotary
from .row_norms import row_norms

__all__ = [
    "attention",
    "circulant_linear",
    "float8_linear",
    "float8_lora_linears",
    "fourier_linear",
    "from_float8",
    "is_of_row",
    "linear",
    "linear_cross_entropy",
    "lora_by_row",
    "lora_linear",
    "lora_linears",
    "own_lora_linear",
    "own_lora_linears",
    "rms_norm",
    "rotary",
    "row_norms",
]
