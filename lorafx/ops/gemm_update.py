"""gemm_update: a product of matrices and its low-rank update by one Triton kernel, which writes the sum once.

    out = x W + b + s · h U       x (m, k), W (k, n), b (n,), h (m, r), U (r, n), all of any strides

Forward W is the weight's transpose and U is Bᵀ; for dx = dy W + g A, x is dy, W the weight and U is A.

Traffic, in elements: cuBLAS reads mk + kn and writes mn, then addmm reads mn + mr + rn and writes mn. The kernel reads
mk + kn + mr + rn and writes mn: 2mn less, of about m (k + 3n + r) + kn, and one launch less.

The update comes first: its tile is scaled in the float32 accumulator that W's product is then added to, and rounded
once. Added last it would need an accumulator of its own, or s · h rounded to the dtype of h.

Where Triton is missing or tensors are not on CUDA `runs` is False, and the operator is the sum of library products.
With TRITON_INTERPRET=1, set before Triton is first imported, tensors on a CPU run the kernel in Triton's interpreter.
Nobody has timed it on a GPU yet, so it is only run where it is asked for (`fuse_lora{gemm='triton'}`).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..torch_private.tensors import is_traceable_wrapper_subclass
from .calls import rows
from .library import LIBRARY
from .modes import autocast_dtype

if TYPE_CHECKING:
    import triton.language as tl
else:
    tl = None  # `kernel` imports it: the rest of this file works without Triton

GEMMS = "library", "triton"  # who computes the products of an adapted linear
_DTYPES = torch.float32, torch.bfloat16, torch.float16
_RANKS = 64  # at most so many at a time, so that any rank fits into shared memory
# Rows, columns and depth of a block, stages, warps. Those too large for a device or a dtype drop out when tuned.
_BLOCKS = (
    (128, 256, 64, 3, 8),
    (256, 128, 64, 3, 8),
    (128, 128, 64, 4, 8),
    (128, 128, 32, 4, 4),
    (64, 128, 64, 4, 4),
    (128, 64, 32, 4, 4),
    (64, 64, 32, 4, 4),
    (32, 64, 64, 4, 4),
)
_INTERPRETED = ((32, 32, 32, 1, 4),)  # small, so that small matrices have several blocks; nothing is tuned


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, update: Tensor, scaling: float) -> Tensor:
    """The equation. x is (m, k), `weight` (k, n), `bias` (n,), `hidden` (m, r), `update` (r, n), all of one dtype."""
    product = x @ weight if bias is None else torch.addmm(bias, x, weight)
    return torch.addmm(product, hidden, update, alpha=scaling)


def _program(
    out,
    x,
    weight,
    bias,
    hidden,
    update,
    scaling,
    m,
    n,
    k: tl.constexpr,
    rank: tl.constexpr,
    about_m,  # a power of two: tuned for anew where it changes, and not for each number of tokens
    x_m,
    x_k,
    weight_k,
    weight_n,
    bias_n,
    hidden_m,
    hidden_r,
    update_r,
    update_n,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,  # in the interpreter alone, which has no products of bfloat16; in float32 they are exact
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One block of `out`, which is (m, n) and contiguous; after the sizes come strides, an `x_m` a step along m in x.

    Programs go down GROUP blocks of rows before they take the next columns, so that W's blocks are in L2 for all of
    them. Rows and columns are counted in int64: logits have more elements than int32 can count.
    """
    row_blocks, column_blocks, program = tl.cdiv(m, ROWS), tl.cdiv(n, COLUMNS), tl.program_id(0)
    in_group = GROUP * column_blocks
    first = program // in_group * GROUP
    height = tl.minimum(row_blocks - first, GROUP)
    row = (first + program % in_group % height).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (program % in_group // height).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    is_row, is_column = row < m, column < n

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rank, RANKS):
        down, along = start + tl.arange(0, RANKS)[:, None], start + tl.arange(0, RANKS)[None, :]
        left = tl.load(hidden + row * hidden_m + along * hidden_r, mask=is_row & (along < rank), other=0.0)
        right = tl.load(update + down * update_r + column * update_n, mask=(down < rank) & is_column, other=0.0)
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    total *= scaling
    for start in range(0, k, DEPTH):
        down, along = start + tl.arange(0, DEPTH)[:, None], start + tl.arange(0, DEPTH)[None, :]
        left = tl.load(x + row * x_m + along * x_k, mask=is_row & (along < k), other=0.0)
        right = tl.load(weight + down * weight_k + column * weight_n, mask=(down < k) & is_column, other=0.0)
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + column * bias_n, mask=is_column, other=0.0).to(tl.float32)
    tl.store(out + row * n + column, total.to(out.dtype.element_ty), mask=is_row & is_column)


@functools.cache
def kernel() -> Any:
    """The kernel, which is tuned once for each dtype, layout and size (rows by powers of two); None without Triton."""
    global tl
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None
    program = triton.jit(_program)
    blocks = _BLOCKS if isinstance(program, triton.JITFunction) else _INTERPRETED
    configs = [
        triton.Config(
            {"ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "GROUP": 8}, num_stages=stages, num_warps=warps
        )
        for rows, columns, depth, stages, warps in blocks
    ]
    prune = {"early_config_prune": _worth_trying}
    return triton.autotune(configs, ["about_m", "n", "k", "rank", "weight_k"], prune_configs_by=prune)(program)


def _worth_trying(configs: list[Any], given: dict[str, Any], **constants: Any) -> list[Any]:
    """Without tensor cores a large block is long to compile, for a minute and more, and does not fit registers."""
    if given["x"].dtype != torch.float32 or constants["PRECISION"] == "tf32":
        return configs
    return [config for config in configs if config.kwargs["ROWS"] * config.kwargs["COLUMNS"] <= 64 * 128]


def runs(*tensors: Tensor | None) -> bool:
    """Whether the kernel computes the sum of products of these: all on one GPU, of one dtype that it knows."""
    given = [tensor for tensor in tensors if tensor is not None]
    device, dtype = given[0].device, given[0].dtype
    if dtype not in _DTYPES or any(t.device != device or t.dtype != dtype for t in given):
        return False
    if autocast_dtype(device.type) not in (None, dtype) or any(map(is_traceable_wrapper_subclass, given)):
        return False  # the library casts, and knows how a subclass computes
    return kernel() is not None and (device.type == "cuda" or _is_interpreted())


def _is_interpreted() -> bool:
    return len(kernel().configs) == len(_INTERPRETED)


def gemm_update(
    x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, update: Tensor, scaling: float
) -> Tensor:
    """As `reference`, of (…, k) and (…, r) too. Where the kernel does not run, by the library."""
    flat = rows(x), weight, bias, rows(hidden), update
    return torch.ops.lorafx.gemm_update.default(*flat, scaling).view(*x.shape[:-1], weight.shape[1])


def _launched(x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, update: Tensor, scaling: float) -> Tensor:
    out = _empty(x, weight, bias, hidden, update, scaling)
    if not runs(x, weight, bias, hidden, update):
        return reference(x, weight, bias, hidden, update, scaling)
    (m, k), n, rank = x.shape, weight.shape[1], update.shape[0]

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (-(-m // meta["ROWS"]) * -(-n // meta["COLUMNS"]),)

    strides = *x.stride(), *weight.stride(), 0 if bias is None else bias.stride(0), *hidden.stride(), *update.stride()
    constants = {"HAS_BIAS": bias is not None, "PRECISION": _precision(), "RANKS": min(_RANKS, _power_of_2(rank))}
    constants["WIDEN"] = _is_interpreted() and x.dtype == torch.bfloat16
    if out.numel():
        with torch.cuda.device_of(x):
            tensors = out, x, weight, bias, hidden, update
            kernel()[grid](*tensors, scaling, m, n, k, rank, _power_of_2(m), *strides, **constants)
    return out


def _empty(x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, update: Tensor, scaling: float) -> Tensor:
    """What the operator gives, not yet computed. `ValueError`: the sizes do not fit one another."""
    (m, k), n, rank = x.shape, weight.shape[1], update.shape[0]
    wanted = {"weight": (k, n), "hidden": (m, rank), "update": (rank, n)} | ({} if bias is None else {"bias": (n,)})
    given = {"weight": weight, "hidden": hidden, "update": update, "bias": bias}
    for name, sizes in wanted.items():
        if tuple(given[name].shape) != sizes:  # type: ignore[union-attr]
            raise ValueError(f"gemm_update: {name} is {tuple(given[name].shape)} and not {sizes}")  # type: ignore
    return x.new_empty(m, n)


def _power_of_2(size: int) -> int:
    """The next one; at least 16, which is the least that tensor cores multiply by."""
    return max(16, 1 << (size - 1).bit_length())


def _precision() -> str:
    """Of float32 products, as torch's own have it."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, hidden, update, ctx.scaling = inputs
    ctx.save_for_backward(x, weight, hidden, update)


def _gradients(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    """By the library: in a second derivative alone, `lora_linear` has a backward of its own for the first."""
    x, weight, hidden, update = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_hidden, needs_update, _ = ctx.needs_input_grad
    return (
        d_out @ weight.t() if needs_x else None,
        x.t() @ d_out if needs_weight else None,
        d_out.sum(0) if needs_bias else None,
        (d_out @ update.t()) * ctx.scaling if needs_hidden else None,
        (hidden.t() @ d_out) * ctx.scaling if needs_update else None,
        None,
    )


LIBRARY.define(
    "gemm_update(Tensor x, Tensor weight, Tensor? bias, Tensor hidden, Tensor update, float scaling) -> Tensor",
    tags=(torch.Tag.flexible_layout,),  # so that compilers copy nothing to give it other strides
)
LIBRARY.impl("gemm_update", _launched, "CompositeExplicitAutograd")
torch.library.register_fake("lorafx::gemm_update", _empty, lib=LIBRARY)
torch.library.register_autograd("lorafx::gemm_update", _gradients, setup_context=_keep, lib=LIBRARY)


@register_flop_formula(torch.ops.lorafx.gemm_update)
def _flops(x: Any, weight: Any, bias: Any, hidden: Any, *_: Any, **__: Any) -> int:
    """What AOTAutograd's partitioner weighs when it chooses what to compute again in backward."""
    return 2 * x[0] * weight[1] * (x[1] + hidden[1])
