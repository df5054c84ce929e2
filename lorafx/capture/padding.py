"""Padding in `nn.TransformerEncoder`: what torch's kernel for it gives at padded positions, without the kernel.

In evaluation torch leaves out padded tokens, by a nested tensor, and fills their places with zeros after the last
layer, before the encoder's own norm. It does so only if all padding is at the end of its row.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ..torch_private.replacing import plain_encoder


def encode(
    self: nn.TransformerEncoder,
    src: Tensor,
    mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool | None = None,
) -> Tensor:
    """`TransformerEncoder.forward`: src (batch, tokens, width), `src_key_padding_mask` (batch, tokens).

    Where torch would use its kernel, but for that there are adapters, padded positions are zeros.
    """
    if mask is not None or src_key_padding_mask is None or not _leaves_padding_out(self, src):
        return plain_encoder(self, src, mask, src_key_padding_mask, is_causal)
    without_norm = SimpleNamespace(layers=self.layers, norm=None, use_nested_tensor=False)
    output = plain_encoder(without_norm, src, mask, src_key_padding_mask, is_causal)  # type: ignore[arg-type]
    kept = src_key_padding_mask.logical_not()  # a mask of floats says -inf where tokens are padding
    left_out = ~kept
    if getattr(self, "mask_check", True):
        left_out = left_out & _is_left_aligned(kept)
    output = output.masked_fill(left_out.unsqueeze(-1), 0.0)
    return output if self.norm is None else self.norm(output)


def _leaves_padding_out(encoder: nn.TransformerEncoder, src: Tensor) -> bool:
    """Whether torch would leave out padding, whatever the mask. It never does with gradients on."""
    nested = getattr(encoder, "use_nested_tensor", False) and not encoder.layers[0].training and src.dim() == 3
    return bool(nested) and not src.is_nested and not torch.is_grad_enabled() and not torch.is_autocast_enabled()


def _is_left_aligned(kept: Tensor) -> Tensor:
    """Whether in each row of (batch, tokens) all that is kept comes first; a tensor, for graphs serve other masks."""
    positions = torch.arange(kept.shape[1], device=kept.device)
    return (kept == (positions < kept.sum(1, keepdim=True))).all()
