"""Products of an adapted linear, bare: which way of computing them is the fastest on this machine.

python tests/bench/products.py [--rounds 30] [--json out.json]

    forward    y = x Wᵀ + s · h Bᵀ        h = x Aᵀ
    backward   dx = dy W + g A            g = s · dy B

base       x Wᵀ, and dy W: the limit
library    as `lora_linear` does it: the narrow product, then the wide one added to it
extended   K-extension, W and B in one buffer: [x | s · h] [W | B]ᵀ, where x is copied beside h, or was written there by
           who made it ("x in place"); and dy [W | B], which is dy W beside dy B
tuned      `torch.compile(mode="max-autotune-no-cudagraphs")` of the equation, on CUDA: Inductor's templates

In float32 at a small Llama's widths on a CPU, in bfloat16 at a Llama-3-8B's on CUDA. All are compared with the equation
in float64 first. Ways take turns in another order each round; a ratio is taken within a round.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.benchmark import Timer

from lorafx.ops.cpu import product_with_update
from lorafx.tables import table

RANK, SCALING = 16, 2.0
Ways = dict[str, Callable[[], Tensor]]


def tensors(rows: int, outputs: int, inputs: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    """x, W, A, B and dy, of values such that no product grows."""
    torch.manual_seed(0)
    shapes = (rows, inputs), (outputs, inputs), (RANK, inputs), (outputs, RANK), (rows, outputs)
    return [torch.randn(shape, device=device, dtype=dtype) * shape[1] ** -0.5 for shape in shapes]


def forward_ways(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Ways:
    both, inputs = torch.cat([weight, lora_B], 1), x.shape[1]
    wide = torch.cat([x, torch.empty_like(x[:, :RANK])], 1)

    def extended(copies: bool) -> Tensor:
        if copies:
            wide[:, :inputs] = x
        torch.mul(F.linear(x, lora_A), SCALING, out=wide[:, inputs:])
        return wide @ both.t()

    ways: Ways = {
        "base": lambda: F.linear(x, weight),
        "library": lambda: product_with_update(x, weight.t(), F.linear(x, lora_A), lora_B.t(), None, SCALING),
        "extended": lambda: extended(True),
        "extended, x in place": lambda: extended(False),
    }
    if x.is_cuda:
        tuned = _tuned(lambda *of: F.linear(of[0], of[1]) + SCALING * F.linear(F.linear(of[0], of[2]), of[3]))
        ways["tuned"] = lambda: tuned(x, weight, lora_A, lora_B)
    return ways


def backward_ways(dy: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Ways:
    both, inputs = torch.cat([weight, lora_B], 1), weight.shape[1]

    def extended() -> Tensor:
        product = dy @ both
        return product[:, :inputs].addmm_(product[:, inputs:], lora_A, alpha=SCALING)

    ways: Ways = {
        "base": lambda: dy @ weight,
        "library": lambda: product_with_update(dy, weight, (dy @ lora_B) * SCALING, lora_A),
        "extended": extended,
    }
    if dy.is_cuda:
        tuned = _tuned(lambda *of: of[0] @ of[1] + SCALING * (of[0] @ of[3]) @ of[2])
        ways["tuned"] = lambda: tuned(dy, weight, lora_A, lora_B)
    return ways


def _tuned(equation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(equation, mode="max-autotune-no-cudagraphs")


def check(ways: Ways, exact: Tensor) -> None:
    """All but the base compute the equation, up to rounding."""
    for name, way in ways.items():
        off = ((way() - exact).norm() / exact.norm()).item()
        limit = 16 * torch.finfo(way().dtype).eps
        assert (off < limit) == (name != "base"), f"{name} is off by {off:.1e}"


def ratios(ways: Ways, rounds: int) -> dict[str, tuple[float, list[float]]]:
    """The median microseconds of each way, and its ratios to the base."""
    timers = {
        name: Timer("way()", globals={"way": way}, num_threads=torch.get_num_threads()) for name, way in ways.items()
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name in random.sample(list(ways), len(ways)):
            taken[name].append(timers[name].timeit(5).median * 1e6)
    return {name: (statistics.median(own), [a / b for a, b in zip(own, taken["base"])]) for name, own in taken.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    on_cuda = torch.cuda.is_available()
    device, dtype, rows = ("cuda", torch.bfloat16, 8192) if on_cuda else ("cpu", torch.float32, 1024)
    hidden, inner = (4096, 14336) if on_cuda else (512, 1376)
    found = []
    for outputs, inputs in ((hidden, hidden), (inner, hidden), (hidden, inner)):
        x, weight, lora_A, lora_B, dy = tensors(rows, outputs, inputs, device, dtype)
        change = weight.double() + SCALING * lora_B.double() @ lora_A.double()
        ways = {
            "forward": forward_ways(x, weight, lora_A, lora_B),
            "backward": backward_ways(dy, weight, lora_A, lora_B),
        }
        check(ways["forward"], x.double() @ change.t())
        check(ways["backward"], dy.double() @ change)
        for direction, of in ways.items():
            for name, (median, to_base) in ratios(of, options.rounds).items():
                low, middle, high = statistics.quantiles(to_base)
                spread = f"{middle:.3f} ({low:.3f} to {high:.3f})"
                found.append((f"{outputs} of {inputs}", direction, name, round(median), spread))
    columns = ("width", "direction", "way", "µs", "to base")
    print(table(f"Products of {rows} rows, {dtype}, {device}", columns, found))
    if options.json:
        options.json.write_text(json.dumps([dict(zip(columns, row)) for row in found], indent=1))


if __name__ == "__main__":
    main()
