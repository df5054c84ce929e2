"""attention: ATen's scaled dot product attention; in training in half precision, by a CPU's faster ways (`ops/cpu`)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .calls import by_reference, needs_backward
from .cpu import trained_attention
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
    """softmax(scale · Q Kᵀ + mask) V, with the arguments, shapes, dtypes, devices and errors of torch's function.

    That is `torch.nn.functional.scaled_dot_product_attention`, which inference, vmap and forward-mode derivatives are.
    """
    if needs_backward(query, key, value, attn_mask) and not by_reference():
        return trained_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


composite(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0,"
    " bool is_causal=False, *, float? scale=None, bool enable_gqa=False) -> Tensor",
    attention,
)
