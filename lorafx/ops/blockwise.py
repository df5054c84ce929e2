"""blockwise: attention in half precision by blocks of queries, forward and backward, as products of whole blocks.

    Sᵢ = scale · Qᵢ Kᵀ     Pᵢ = softmax(Sᵢ)     Oᵢ = Pᵢ V          of a causal block the keys up to its last query alone

    dPᵢ = dOᵢ Vᵀ     dSᵢ = Pᵢ ∘ (dPᵢ - Σ Pᵢ ∘ dPᵢ)     dQᵢ = scale · dSᵢ K     dK += scale · dSᵢᵀ Qᵢ     dV += Pᵢᵀ dOᵢ

It keeps Q, K and V, and makes Pᵢ again for backward. As in torch's own kernel, scores, dPᵢ and sums over blocks are in
float32, and Pᵢ and dSᵢ are rounded to be multiplied, except where half precision is multiplied in float32 (`wide`).
That kernel goes by 32 or 64 queries of one head at a time, too few for fast products; for long sequences it takes more.
Query heads that share keys and values are rows of one block, so that nothing is repeated for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .calls import is_plain
from .wide import is_half, is_slow, wide

_SHORT = 768  # queries, from which on torch's blocks are large enough
_FEW = 2**16  # scores, below which calls are what takes time
_LEAST, _MOST = 64, 128  # queries in a block


def pays(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, enable_gqa: bool) -> bool:
    """Whether training is faster by blocks. Queries are (batch, heads, n, d), keys and values (batch, heads, m, …)."""
    if not all(is_plain(each) and each.is_cpu and each.ndim == 4 for each in (query, key, value)):
        return False
    batch, heads, queries, features = query.shape
    shared, keys = (key.shape[1] if enable_gqa else heads), key.shape[2]
    return (
        query.dtype == key.dtype == value.dtype
        and is_half(query)
        and (queries < _SHORT or is_slow(query))
        and batch * heads * queries * keys >= _FEW
        and keys == (queries if is_causal else keys)
        and key.shape == (batch, shared, keys, features)
        and value.shape[:3] == key.shape[:3]
        and heads % shared == 0
    )


class Attention(torch.autograd.Function):
    """Of tensors for which it `pays`."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.options = is_causal, scale
        with torch.autocast("cpu", enabled=False):  # or it would make half precision of what is wide
            return _output(query, key, value, is_causal, scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        run = _by_autograd if torch.is_grad_enabled() else _gradients
        with torch.autocast("cpu", enabled=False):
            return *run(dy, *ctx.saved_tensors, *ctx.options), None, None


def _output(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> Tensor:
    batch, heads, queries, _ = query.shape
    output = query.new_empty(batch, queries, heads, value.shape[3]).transpose(1, 2)  # as who joins heads wants it
    keys, values = wide(key.flatten(0, 1)) * scale, _multiplied(value.flatten(0, 1))
    by_keys, to = _by_keys(query, key), _by_keys(output, key)
    for first, last, seen in _blocks(queries, key.shape[2], is_causal):
        weights = _weights(wide(_block(by_keys, first, last)), keys[:, :seen], first, is_causal)
        _put(to, first, last, torch.bmm(weights.to(values.dtype), values[:, :seen]))
    return output


def _gradients(
    dy: Tensor, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, ...]:
    d_query = torch.empty_like(query)
    by_keys, dy_by_keys, to = (_by_keys(each, key) for each in (query, dy, d_query))
    keys, values = wide(key.flatten(0, 1)) * scale, wide(value.flatten(0, 1))
    multiplied_keys = keys.to(_multiplied(key).dtype)
    d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
    for first, last, seen in _blocks(query.shape[2], key.shape[2], is_causal):
        queries, d_block = _block(by_keys, first, last), _block(dy_by_keys, first, last)
        weights = _weights(wide(queries), keys[:, :seen], first, is_causal)
        d_weights = torch.bmm(wide(d_block), values[:, :seen].mT)
        d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
        weights, d_scores = weights.to(multiplied_keys.dtype), d_scores.to(multiplied_keys.dtype)
        _put(to, first, last, torch.bmm(d_scores, multiplied_keys[:, :seen]))
        _add_product(d_values[:, :seen], weights.mT, _multiplied(d_block))
        _add_product(d_keys[:, :seen], d_scores.mT, _multiplied(queries))
    return d_query, (d_keys * scale).to(key.dtype).view_as(key), d_values.to(value.dtype).view_as(value)


def _by_autograd(
    dy: Tensor, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, ...]:
    """The gradients by formulas that have derivatives themselves."""
    with sdpa_kernel(SDPBackend.MATH):
        shared = query.shape[1] != key.shape[1]
        output = F.scaled_dot_product_attention(query, key, value, None, 0.0, is_causal, scale=scale, enable_gqa=shared)
    return torch.autograd.grad(output, (query, key, value), dy, create_graph=True, allow_unused=True)


def _blocks(queries: int, keys: int, is_causal: bool) -> Iterator[tuple[int, int, int]]:
    """The first query of each block, the one after its last, and how many keys it sees."""
    size = min(max(_LEAST, -(-queries // 8)), _MOST)
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
        scores.unflatten(1, (-1, size))[..., first:] += torch.full((size, size), -torch.inf).triu_(1)
    return torch.softmax(scores, -1)


def _multiplied(tensor: Tensor) -> Tensor:
    """In the dtype in which this machine multiplies fast."""
    return wide(tensor) if is_slow(tensor) else tensor


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.baddbmm_(left, right)
    else:
        total.add_(torch.bmm(left, right))
