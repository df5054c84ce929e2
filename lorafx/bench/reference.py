"""The reference: what a case should give, by PEFT in more precision than the case's, and how far off rounding may be.

    small bases, short sequences    PEFT in float64 (quantised ones in float32), and fixed limits
    others                          PEFT in float32; where that does not fit, in the case's own dtype

How far a bfloat16 model's gradients are off by rounding alone grows with its depth: in 32 layers a fifth, PEFT's own
among them. So where a case is not small PEFT's own distance from the reference is taken as well, and twice of it is
rounding too: two ways of rounding that know nothing of each other have errors of one size, and the worst tensor of
hundreds varies.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from .cases import Case
from .contestants import apart, first_line, with_peft
from .measure import Outcome, differences, runner
from .models import Batch

EXACT_BELOW, EXACT_UP_TO = 400e6, 4096  # parameters of a base that is also run in float64, and tokens of a sequence
# The largest relative differences of outputs and gradients that rounding explains; those of a wrong one are about 1.
OUTPUTS_OFF = {"float32": 1e-5, "bfloat16": 3e-2}
GRADIENTS_OFF = {"float32": 1e-4, "bfloat16": 2e-1}
ROUNDINGS = 2.0  # times PEFT's own distance


@dataclass(frozen=True)
class Reference:
    """What is expected (None if nobody could say), by whom, and the largest differences that rounding explains."""

    outcome: Outcome | None
    by: str
    outputs_off: float
    gradients_off: float


def reference(case: Case, base: nn.Module, batch: Batch) -> Reference:
    """Run PEFT on a copy of the base in a wider dtype, which is freed before this returns."""
    limits = OUTPUTS_OFF[case.dtype], GRADIENTS_OFF[case.dtype]
    small = sum(p.numel() for p in base.parameters()) < EXACT_BELOW and case.sequence <= EXACT_UP_TO
    try:
        if small:
            exact = torch.float32 if case.quantised else torch.float64  # bitsandbytes computes in no wider one
            return Reference(_outcome(case, *_wider(base, batch, exact)), f"PEFT in {str(exact)[6:]}", *limits)
        # Without dropout, which parity leaves out, PEFT can keep checkpoints alone, and gives the same numbers.
        case = replace(case, dropout=0.0, checkpointing=case.part in ("model", "block") and not case.decode)
        own = _outcome(case, base, batch)
        wide = _in_float32(case, base, batch)
    except Exception as error:  # on a device that is too small, say
        return Reference(None, f"nothing, for PEFT failed: {first_line(error)}", *limits)
    finally:
        tidy()
    if wide is None:
        return Reference(own, f"PEFT in {case.dtype}, for float32 does not fit", *limits)
    off = [ROUNDINGS * (each or 0.0) for each in differences(own, wide)]
    return Reference(wide, "PEFT in float32", *map(max, limits, off))


def _in_float32(case: Case, base: nn.Module, batch: Batch) -> Outcome | None:
    """None where memory does not suffice."""
    try:
        with _fast_float32(case):
            return _outcome(case, *_wider(base, batch, torch.float32))
    except torch.OutOfMemoryError:
        return None


def _wider(base: nn.Module, batch: Batch, dtype: torch.dtype) -> tuple[nn.Module, Batch]:
    if {p.dtype for p in base.parameters() if p.is_floating_point()} == {dtype}:
        return base, batch
    return copy.deepcopy(base).to(dtype), batch.as_dtype(dtype)


def _outcome(case: Case, base: nn.Module, batch: Batch) -> Outcome:
    setup = with_peft(case, base) if case.adapters == 1 else apart(case, base, by_peft=True)
    return runner(case, setup, batch).outcome()


@contextmanager
def _fast_float32(case: Case) -> Iterator[None]:
    """Multiply as TF32 to judge half precision: it is eight times as precise as bfloat16, and quick."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if case.dtype == "float32" else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def tidy() -> None:
    """Give back what is no longer held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
