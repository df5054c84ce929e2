"""The loss's kernel by how many classes a program works on at a time, and by how many of these a warp has.

python tests/bench/cross_entropy_blocks.py [--rows 1024] [--classes 128256] [--rounds 20]

All take turns, in another order each round; the fastest is printed last. On a CPU, where Triton
interprets kernels (TRITON_INTERPRET=1) and the numbers mean nothing, it is tried out with few rows and classes.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics

import torch

from lorafx.bench.measure import seconds
from lorafx.ops.cuda import cross_entropy

BLOCKS, PER_WARP = (2048, 4096, 8192, 16384, 32768), (256, 512, 1024)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("rows", 1024), ("classes", 128256), ("rounds", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    logits = torch.randn(asked.rows, asked.classes, device=device).to(dtype)
    labels = torch.randint(asked.classes, (asked.rows,), device=device)
    factor, products = torch.ones((), device=device), logits.clone()

    def step() -> None:
        cross_entropy.cross_entropy_in_place(products, labels, -100, 0.0, None, 1.0, factor, True)

    def taken(block: int, per_warp: int) -> float:
        cross_entropy._BLOCK, cross_entropy._PER_WARP = block, per_warp
        products.copy_(logits)
        return seconds(step, cuda)

    ways = [(block, each) for block, each in itertools.product(BLOCKS, PER_WARP) if block <= 32 * each]  # a GPU's most
    for way in ways:
        taken(*way)  # compiles it
    found: dict[tuple[int, int], list[float]] = {way: [] for way in ways}
    for _ in range(asked.rounds):
        for way in random.sample(ways, len(ways)):
            found[way].append(taken(*way))
    for way in sorted(ways, key=lambda way: -statistics.median(found[way])):
        low, middle, high = statistics.quantiles(found[way], n=4)
        print(f"{way[0]:6} classes, {way[1]:5} a warp: {middle * 1e3:.3f} ms ({low * 1e3:.3f} to {high * 1e3:.3f})")


if __name__ == "__main__":
    main()
