"""Attention in half precision that a gradient goes through: by blocks of queries, as products of whole blocks.

    Sᵢ = scale · Qᵢ Kᵀ     Pᵢ = softmax(Sᵢ)     Oᵢ = Pᵢ V          of a causal block the keys up to its last query alone

    dPᵢ = dOᵢ Vᵀ     dSᵢ = Pᵢ ∘ (dPᵢ - Σ Pᵢ ∘ dPᵢ)     dQᵢ = scale · dSᵢ K     dK += scale · dSᵢᵀ Qᵢ     dV += Pᵢᵀ dOᵢ

It keeps Q, K and V, and makes Pᵢ again for backward. As in torch's own kernel, scores, dPᵢ and sums over blocks are in
float32; the other factors and each product are rounded, except where half precision is slow (`half_precision`).
Query heads that share keys and values are rows of one block, so that nothing is repeated for them.

torch's kernel goes by 32 or 64 queries of one head at a time, too few for fast products; for long sequences it takes
more. On two cores of an AMD EPYC that multiplies bfloat16, a training step of the bench's train-bf16 takes 1.031 of the
frozen base's time by blocks and 1.109 without, one of train-bf16-512 0.955 and 1.120 (docs/experiments.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...torch_private.tensors import is_batched_gradient
from ..calls import by_reference, is_plain
from ..dtypes import at_least_float32, is_half
from ..modes import autocast_dtype
from . import half_precision
from .half_precision import is_slow, widened_where_slow

_SHORT = 768  # queries: from here on torch's blocks are large enough
_FEW, _MANY = 2**16, 2**23  # scores: below so many in all, calls take more time than arithmetic; at most in a block
_LEAST, _MOST = 64, 128  # queries in a block, as far as `_MANY` allows


def has_attention_for(query: Tensor) -> bool:
    """Whether this processor may have a faster way than ATen's to train attention on values like these."""
    return query.is_cpu and is_half(query)


def trained_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """As torch's function: by blocks where that pays, else by torch's kernel.

    That runs in float32 where half precision is slow, and again for backward, so that nothing in float32 is kept.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    given = query, key, value, attn_mask
    if attn_mask is None and not dropout_p and pays(query, key, value, is_causal, enable_gqa):
        factor = query.shape[3] ** -0.5 if scale is None else scale
        return _Attention.apply(query, key, value, is_causal, factor).transpose(1, 2)
    if half_precision.pays(query):
        return checkpoint(widened_where_slow(attend), *given, use_reentrant=False, preserve_rng_state=dropout_p > 0)
    return attend(*given)


def pays(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, enable_gqa: bool) -> bool:
    """Whether training is faster by blocks. Queries are (batch, heads, n, d), keys and values (batch, heads, m, …)."""
    if not all(is_plain(each) and each.is_cpu and each.ndim == 4 for each in (query, key, value)):
        return False
    batch, heads, queries, features = query.shape
    shared, keys = (key.shape[1] if enable_gqa else heads), key.shape[2]
    return (
        query.dtype == key.dtype == value.dtype
        and is_half(query)
        and autocast_dtype("cpu") in (None, query.dtype)
        and (queries < _SHORT or is_slow(query))
        and batch * heads * queries * keys >= _FEW
        and features > 0
        and keys == (queries if is_causal else keys)
        and key.shape == (batch, shared, keys, features)
        and value.shape[:3] == key.shape[:3]
        and shared > 0
        and heads % shared == 0
        and torch.backends.cuda.flash_sdp_enabled()  # these two go for CPUs too: off, somebody chose a kernel
        and torch.backends.cuda.math_sdp_enabled()
    )


class _Attention(torch.autograd.Function):
    """Of tensors for which it `pays`. Gives (batch, n, heads, …), so that joining the heads afterwards is no copy."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.options = is_causal, scale
        with torch.autocast("cpu", enabled=False):  # which would multiply float32 in half precision
            return _output(query, key, value, is_causal, scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dy, needs = dy.transpose(1, 2), ctx.needs_input_grad[:3]
        batched = is_batched_gradient(dy)  # of `is_grads_batched`
        run = _by_autograd if torch.is_grad_enabled() or by_reference() or batched else _gradients
        with torch.autocast("cpu", enabled=False):
            return *run(dy, *ctx.saved_tensors, *ctx.options, needs), None, None  # type: ignore[call-arg]


def _output(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> Tensor:
    batch, heads, queries, _ = query.shape
    output = query.new_empty(batch, queries, heads, value.shape[3])
    keys, values = at_least_float32(key.flatten(0, 1)) * scale, value.flatten(0, 1).to(_multiplied_in(value))
    by_keys, to = _by_keys(query, key), _by_keys(output.transpose(1, 2), key)
    for first, last, seen in _blocks(query, key, is_causal):
        weights = _weights(at_least_float32(_block(by_keys, first, last)), keys[:, :seen], first, is_causal)
        _put(to, first, last, torch.bmm(weights.to(values.dtype), values[:, :seen]))
    return output


def _gradients(
    dy: Tensor, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Those that are needed. Scaled before the products: in float16 an unscaled one may be too large a number."""
    needs_query, needs_key, needs_value = needs
    keys, values = at_least_float32(key.flatten(0, 1)) * scale, at_least_float32(value.flatten(0, 1))
    dtype = _multiplied_in(key)
    rounded_keys = keys.to(dtype)
    d_query, d_keys, d_values = torch.empty_like(query), torch.zeros_like(keys), torch.zeros_like(values)
    by_keys, dy_by_keys, to = (_by_keys(each, key) for each in (query, dy, d_query))
    for first, last, seen in _blocks(query, key, is_causal):
        queries, d_block = _block(by_keys, first, last), _block(dy_by_keys, first, last)
        weights = _weights(at_least_float32(queries), keys[:, :seen], first, is_causal)
        if needs_value:
            _add_product(d_values[:, :seen], weights.to(dtype).mT, d_block.to(dtype))
        if not (needs_query or needs_key):
            continue
        d_weights = torch.bmm(at_least_float32(d_block), values[:, :seen].mT)
        d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype).to(dtype)
        if needs_query:
            _put(to, first, last, torch.bmm(d_scores, rounded_keys[:, :seen]))
        if needs_key:
            _add_product(d_keys[:, :seen], d_scores.mT, queries.to(dtype) * scale)
    return (
        d_query if needs_query else None,
        d_keys.to(key.dtype).view_as(key) if needs_key else None,
        d_values.to(value.dtype).view_as(value) if needs_value else None,
    )


def _by_autograd(
    dy: Tensor, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients by torch's operators, which have derivatives and rules for batches themselves."""
    shared = query.shape[1] != key.shape[1]
    with torch.enable_grad():
        output, _ = torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, None, 0.0, is_causal, None, scale=scale, enable_gqa=shared
        )
    wanted = [each for each, needed in zip((query, key, value), needs) if needed]
    found = iter(torch.autograd.grad(output, wanted, dy, create_graph=torch.is_grad_enabled()))
    return tuple(next(found) if needed else None for needed in needs)


def _blocks(query: Tensor, key: Tensor, is_causal: bool) -> Iterator[tuple[int, int, int]]:
    """The first query of each block, the one after its last, and how many keys it sees."""
    batch, heads, queries, keys = *query.shape[:3], key.shape[2]
    size = min(max(_LEAST, -(-queries // 8)), _MOST, max(1, _MANY // (batch * heads * keys)))
    for first in range(0, queries, size):
        last = min(first + size, queries)
        yield first, last, last if is_causal else keys


def _by_keys(tensor: Tensor, key: Tensor) -> Tensor:
    """A view of (batch, heads, n, …) as (batch, key heads, heads that share one, n, …)."""
    return tensor.unflatten(1, (key.shape[1], -1))


def _block(by_keys: Tensor, first: int, last: int) -> Tensor:
    """(batch · key heads, heads that share one · block, …)."""
    return by_keys[:, :, :, first:last].flatten(2, 3).flatten(0, 1)


def _put(by_keys: Tensor, first: int, last: int, block: Tensor) -> None:
    part = by_keys[:, :, :, first:last]
    part.copy_(block.view(part.shape))


def _weights(queries: Tensor, keys: Tensor, first: int, is_causal: bool) -> Tensor:
    """softmax(Qᵢ Kᵀ) of a block, whose queries of each head begin with number `first`."""
    scores = torch.bmm(queries, keys.mT)
    if is_causal:
        size = keys.shape[1] - first
        later = torch.ones(size, size, dtype=torch.bool, device=keys.device).triu_(1)
        scores.unflatten(1, (-1, size))[..., first:].masked_fill_(later, -torch.inf)
    return torch.softmax(scores, -1)


def _multiplied_in(tensor: Tensor) -> torch.dtype:
    """The dtype in which this machine multiplies what a tensor holds."""
    return torch.float32 if is_slow(tensor) else tensor.dtype


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.baddbmm_(left, right)
    else:
        total.add_(torch.bmm(left, right))
