"""attention: ATen's scaled dot product attention as it is, but in training in float32 where `wide` says that it pays.

There torch's own kernel takes 109 ms forward and backward for 4 x 256 tokens of 8 heads of 64 in bfloat16, and 37 ms by
way of float32 with forward run again for backward, so that nothing wide is kept. Forward alone it takes 7 and 12 ms:
inference stays as it is.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .calls import by_reference, needs_backward
from .library import composite
from .wide import pays, widened


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
    if not needs_backward(*given) or by_reference() or not pays(query):
        return attend(*given)
    return checkpoint(widened(attend), *given, use_reentrant=False, preserve_rng_state=dropout_p > 0)


composite(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0,"
    " bool is_causal=False, *, float? scale=None, bool enable_gqa=False) -> Tensor",
    attention,
)
