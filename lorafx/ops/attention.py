"""attention: ATen's scaled dot product attention as it is, but in training in half precision on a CPU by faster ways.

That is by blocks of queries (`blockwise`), where there is neither mask nor dropout, and queries are few or half
precision is slow. Else it is torch's kernel, in float32 (`wide`) where half precision is slow; then forward runs again
for backward, so that nothing wide is kept. Inference stays as it is.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .calls import by_reference, needs_backward
from .cpu import blockwise
from .cpu.wide import pays, widened
from .library import composite


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale · Q Kᵀ + mask) V, with arguments as torch's function has them."""

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    given = query, key, value, attn_mask
    if not needs_backward(*given) or by_reference():
        return attend(*given)
    if attn_mask is None and not dropout_p and blockwise.pays(query, key, value, is_causal, enable_gqa):
        factor = query.shape[3] ** -0.5 if scale is None else scale
        return blockwise.Attention.apply(query, key, value, is_causal, factor).transpose(1, 2)
    if pays(query):
        return checkpoint(widened(attend), *given, use_reentrant=False, preserve_rng_state=dropout_p > 0)
    return attend(*given)


composite(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0,"
    " bool is_causal=False, *, float? scale=None, bool enable_gqa=False) -> Tensor",
    attention,
)
