"""Operators that multiply, as functions of x (…, in), W (out, in), b (out), A (r, in) and B (out, r)."""

import torch

from lorafx.ops import linear, lora_linear, lora_linears


def of_lora_linear(x, W, b, A, B):
    return lora_linear(x, W, b, None, A, B, 1.7)


def of_two_values(x, W, b, A, B):
    return lora_linear(x, W, b, x.flip(0), A, B, 1.7)


def of_lora_linears(x, W, b, A, B):
    """Two sites of different widths and ranks."""
    one, two = lora_linears(x, [W, W[:-2]], [b, None], [A, A[:-2]], [B, B[:-2, :-2]], [1.7, 0.5])
    return torch.cat((one, two), -1)


def of_linear(x, W, b, A, B):
    return linear(x, W, b)


ADAPTED = [of_lora_linear, of_two_values, of_lora_linears]
