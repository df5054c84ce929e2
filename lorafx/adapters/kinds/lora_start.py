"""Start values of LoRA that are taken out of the base weight, which is left with the rest.

W  ≈  rest + s · B A

pissa   B A: the r largest singular values of W, over s        (Meng et al., arXiv 2404.02948)
olora   B A: the first r columns of Q times the first r rows of R, where W = Q R    (Büyükakyüz, arXiv 2406.01775)
loftq   rest = quantised(W - B A), then B A: the r largest singular values of W - rest, `loftq_iter` times, whatever
        s is        (Li et al., arXiv 2310.08659)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError

Start = tuple[Tensor, Tensor, Tensor]
_NITER = "pissa_niter_"


def is_taken(init: Any) -> bool:
    """Whether `init_lora_weights` names one of these."""
    return init in ("pissa", "olora", "loftq") or is_random(init)


def is_random(init: Any) -> bool:
    """Whether they are approximated by random numbers: PiSSA by so many iterations, `pissa_niter_16`."""
    return isinstance(init, str) and init.startswith(_NITER) and init.removeprefix(_NITER).isdigit()


def taken(
    weight: Tensor, r: int, scaling: float, init: str, loftq: Mapping[str, Any], rng: torch.Generator | None
) -> Start:
    """A (r, in), B (out, r) and the rest (out, in) of a dense weight (out, in), all of its dtype."""
    if init == "loftq":
        return _loftq(weight, r, loftq["loftq_bits"], loftq["loftq_iter"])
    a, b = _olora(weight, r) if init == "olora" else _pissa(weight, r, scaling, init, rng)
    return a, b, weight - scaling * b @ a


def low_rank(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) with B A as near to a matrix (out, in) as r allows, each with half of what scales it."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return _halved(u[:, :r], s[:r], vh[:r])


def _halved(u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    root = s.sqrt()
    return root[:, None] * vh, u * root


def _pissa(weight: Tensor, r: int, scaling: float, init: str, rng: torch.Generator | None) -> tuple[Tensor, Tensor]:
    if init == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        return _halved(u[:, :r], s[:r] / scaling, vh[:r])
    with torch.random.fork_rng(enabled=rng is not None):
        if rng is not None:  # torch's function draws from its global generator
            torch.manual_seed(int(torch.randint(2**62, (), generator=rng)))
        u, s, v = torch.svd_lowrank(weight, r, niter=int(init.removeprefix(_NITER)))
    return _halved(u, s / scaling, v.t())


def _olora(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    q, upper = torch.linalg.qr(weight)
    return upper[:r], q[:, :r]


def _loftq(weight: Tensor, r: int, bits: int, iterations: int) -> Start:
    found = torch.zeros_like(weight)
    for _ in range(iterations):
        rest = _quantised(weight - found, bits)
        a, b = low_rank(weight - rest, r)
        found = b @ a
    return a, b, rest


def _quantised(weight: Tensor, bits: int) -> Tensor:
    """What is left of a weight in bitsandbytes' NF4, or in its int8 by rows."""
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise ConfigError('`init_lora_weights="loftq"` quantises with bitsandbytes: install it') from error
    if bits == 4:
        packed, state = functional.quantize_4bit(weight.float().contiguous(), quant_type="nf4")
        return functional.dequantize_4bit(packed, state).to(weight.dtype)
    packed, scales, _ = functional.int8_vectorwise_quant(weight.half())
    return functional.int8_vectorwise_dequant(packed, scales).to(weight.dtype)
