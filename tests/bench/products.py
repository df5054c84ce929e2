"""Products of a layer's adapted linears, bare: which way of computing them is the fastest on this machine.

python tests/bench/products.py [--tokens 512 4096 16384] [--ways base stacked ...] [--rounds 10] [--json out.json]

    forward    yᵢ = x Wᵢᵀ + s · hᵢ Bᵢᵀ        hᵢ = x Aᵢᵀ        for each linear i that reads x
    backward   dx = Σ dyᵢ Wᵢ + gᵢ Aᵢ          gᵢ = s · dyᵢ Bᵢ,  dAᵢ = gᵢᵀ x,  dBᵢ = s · dyᵢᵀ hᵢ

base       x Wᵢᵀ, and Σ dyᵢ Wᵢ: the limit
single     one narrow product for each linear, then the wide one added to it
stacked    the Aᵢ on top of one another: one narrow product with x for all, and one back to dx
extended   K-extension, Wᵢ and Bᵢ in one buffer: [x | s · h] [Wᵢ | Bᵢ]ᵀ, where x is copied beside h, or was written
           there by who made it ("in place"); and Σ dyᵢ [Wᵢ | Bᵢ], which is dx's wide part beside g
merged     Wᵢ + s · Bᵢ Aᵢ written to a buffer, which all linears of the model could share, then multiplied; made again
           for backward, and so is h
tuned      `torch.compile(mode="max-autotune-no-cudagraphs")` of "stacked": minutes a shape, so only if asked for

In float32 at a small Llama's widths on a CPU, in bfloat16 at a Llama-3-8B's on CUDA, where each way is a CUDA graph:
the device's time is compared. Several copies of all tensors are gone through, or small weights would lie in a cache.
All ways are compared with the equation in float64 first. They take turns in another order each round, and a ratio is
taken within a round; "layer" are the sums of all linears.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lorafx.tables import table

RANK, SCALING, COPIES = 16, 2.0, 4
Run = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Site:
    """A linear's W (out, in), A (r, in), B (out, r) and dy (rows, out)."""

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    dy: Tensor


@dataclass(frozen=True)
class Group:
    """The linears that read one x (rows, in), and their A on top of one another."""

    x: Tensor
    sites: tuple[Site, ...]
    lora_As: Tensor

    def columns(self, wide: Tensor) -> list[Tensor]:
        """The last r columns for each site, of (rows, … + sites · r)."""
        return list(wide[:, -RANK * len(self.sites) :].split(RANK, 1))


def group(rows: int, inputs: int, outputs: Sequence[int], device: str, dtype: torch.dtype) -> Group:
    """Of values such that no product grows."""

    def random_of(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype) * shape[1] ** -0.5

    shapes = [((n, inputs), (RANK, inputs), (n, RANK), (rows, n)) for n in outputs]
    sites = tuple(Site(*(random_of(*shape) for shape in each)) for each in shapes)
    return Group(random_of(rows, inputs), sites, torch.cat([site.lora_A for site in sites]))


# Each way takes a group and gives what is run forward, and what is run backward.


def base(of: Group) -> tuple[Run, Run]:
    def backward() -> list[Tensor]:
        return [_sum_onto(None, [(site.dy, site.weight) for site in of.sites])]

    return lambda: [F.linear(of.x, site.weight) for site in of.sites], backward


def single(of: Group) -> tuple[Run, Run]:
    hidden = [F.linear(of.x, site.lora_A) for site in of.sites]

    def forward() -> list[Tensor]:
        return [_updated(of.x, site, F.linear(of.x, site.lora_A)) for site in of.sites]

    def backward() -> list[Tensor]:
        gs = [_scaled(site.dy @ site.lora_B) for site in of.sites]
        narrow = [(g, site.lora_A) for g, site in zip(gs, of.sites)]
        dx = _sum_onto(None, narrow + [(site.dy, site.weight) for site in of.sites])
        return [dx, *(g.t() @ of.x for g in gs), *_d_lora_B(of, hidden)]

    return forward, backward


def stacked(of: Group) -> tuple[Run, Run]:
    hidden = of.columns(F.linear(of.x, of.lora_As))

    def forward() -> list[Tensor]:
        columns = of.columns(F.linear(of.x, of.lora_As))
        return [_updated(of.x, site, h) for site, h in zip(of.sites, columns)]

    def backward() -> list[Tensor]:
        g = _scaled(torch.cat([site.dy @ site.lora_B for site in of.sites], 1))
        dx = _sum_onto(g @ of.lora_As, [(site.dy, site.weight) for site in of.sites])
        return [dx, *(g.t() @ of.x).split(RANK), *_d_lora_B(of, hidden)]

    return forward, backward


def extended(of: Group, in_place: bool = False) -> tuple[Run, Run]:
    inputs, added = of.x.shape[1], RANK * len(of.sites)
    wide = torch.cat([of.x, of.x.new_zeros(len(of.x), added)], 1)
    both = [torch.cat([site.weight, site.weight.new_zeros(len(site.weight), added)], 1) for site in of.sites]
    for site, weight, place in zip(of.sites, both, range(len(both))):
        weight[:, inputs + place * RANK : inputs + (place + 1) * RANK] = site.lora_B
    hidden = of.columns(F.linear(of.x, of.lora_As))

    def forward() -> list[Tensor]:
        if not in_place:
            wide[:, :inputs] = of.x
        torch.mul(F.linear(of.x, of.lora_As), SCALING, out=wide[:, inputs:])
        return [F.linear(wide, weight) for weight in both]

    def backward() -> list[Tensor]:
        product = _sum_onto(None, [(site.dy, weight) for site, weight in zip(of.sites, both)])
        g = _scaled(product[:, inputs:])
        return [
            product[:, :inputs].addmm_(g, of.lora_As),
            *(g.t() @ of.x).split(RANK),
            *_d_lora_B(of, hidden),
        ]

    return forward, backward


def merged(of: Group) -> tuple[Run, Run]:
    buffer = of.x.new_empty(max(site.weight.numel() for site in of.sites))

    def put_together(site: Site) -> Tensor:
        out = buffer[: site.weight.numel()].view(site.weight.shape)
        return torch.addmm(site.weight, site.lora_B, site.lora_A, alpha=SCALING, out=out)

    def forward() -> list[Tensor]:
        return [F.linear(of.x, put_together(site)) for site in of.sites]

    def backward() -> list[Tensor]:
        dx = None
        for site in of.sites:
            dx = _sum_onto(dx, [(site.dy, put_together(site))])
        g = _scaled(torch.cat([site.dy @ site.lora_B for site in of.sites], 1))
        hidden = of.columns(F.linear(of.x, of.lora_As))
        return [dx, *(g.t() @ of.x).split(RANK), *_d_lora_B(of, hidden)]

    return forward, backward


def tuned(of: Group) -> tuple[Run, Run]:
    compiled = (torch.compile(run, mode="max-autotune-no-cudagraphs", dynamic=False) for run in stacked(of))
    forward, backward = compiled
    return forward, backward


def _updated(x: Tensor, site: Site, h: Tensor) -> Tensor:
    return (h @ site.lora_B.t()).addmm_(x, site.weight.t(), beta=SCALING)


def _scaled(g: Tensor) -> Tensor:
    return g * SCALING


def _d_lora_B(of: Group, hidden: Sequence[Tensor]) -> list[Tensor]:
    return [_scaled(site.dy.t() @ h) for site, h in zip(of.sites, hidden)]


def _sum_onto(total: Tensor | None, products: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    for left, right in products:
        total = left @ right if total is None else total.addmm_(left, right)
    assert total is not None
    return total


WAYS: dict[str, Callable[[Group], tuple[Run, Run]]] = {
    "base": base,
    "single": single,
    "stacked": stacked,
    "extended": extended,
    "extended, in place": partial(extended, in_place=True),
    "merged": merged,
    "tuned": tuned,
}


def check(name: str, of: Group, runs: tuple[Run, Run]) -> None:
    """All but the base compute the equation, up to rounding."""
    sites = [Site(*(value.double() for value in vars(site).values())) for site in of.sites]
    exact_of = Group(of.x.double(), tuple(sites), of.lora_As.double())
    for run, exact in zip(runs, stacked(exact_of)):
        for found, expected in zip(run(), exact()):
            off = float((found - expected).norm() / expected.norm())
            eps, length = torch.finfo(found.dtype).eps, max(*of.x.shape, *(site.dy.shape[1] for site in of.sites))
            limit = 4 * eps + length**0.5 * torch.finfo(torch.float32).eps
            if name != "base":
                assert off < limit, f"{name} is off by {off:.1e}, more than {limit:.1e}"


def seconds_of(runs: Sequence[Run], device: str) -> Callable[[], float]:
    """How long one of these takes, on CUDA by replaying a graph of them all."""
    if device == "cpu":
        return partial(_by_the_clock, runs)
    for run in runs:
        run()  # or a library would set itself up while it is captured
    torch.cuda.synchronize()
    graph, first, last = torch.cuda.CUDAGraph(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.graph(graph, pool=_first[0].pool() if _first else None):
        for run in runs:
            run()
    if not _first:
        _first.append(graph)

    def timed() -> float:
        first.record()
        graph.replay()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3 / len(runs)

    return timed


# Its memory is that of all graphs: they overwrite each other's results, which nobody reads.
_first: list[torch.cuda.CUDAGraph] = []


def _by_the_clock(runs: Sequence[Run]) -> float:
    start = time.perf_counter()
    for run in runs:
        run()
    return (time.perf_counter() - start) / len(runs)


Timed = dict[tuple[str, str], list[tuple[float, float]]]  # of a group and a way: forward and backward by round


def measured(rows: int, ways: Sequence[str], rounds: int, device: str) -> Timed:
    dtype, hidden, keys, inner = (
        (torch.bfloat16, 4096, 1024, 14336) if device == "cuda" else (torch.float32, 512, 128, 1376)
    )
    taken: Timed = {}
    for label, inputs, outputs in (
        ("q, k, v", hidden, (hidden, keys, keys)),
        ("o", hidden, (hidden,)),
        ("gate, up", hidden, (inner, inner)),
        ("down", inner, (hidden,)),
    ):
        torch.manual_seed(0)
        groups = [group(rows, inputs, outputs, device, dtype) for _ in range(COPIES)]
        timers = {}
        for name in ways:
            made = [WAYS[name](of) for of in groups]
            check(name, groups[0], made[0])
            timers[name] = [seconds_of(runs, device) for runs in zip(*made)]
            taken[label, name] = []
        for _ in range(rounds):
            for name in random.sample(list(ways), len(ways)):
                forward, backward = (timer() for timer in timers[name])
                taken[label, name].append((forward, backward))
    return taken


def with_layer(taken: Timed, ways: Sequence[str]) -> Timed:
    """And the sums over a layer's linears."""
    groups = dict.fromkeys(label for label, _ in taken)
    sums: Timed = {}
    for name in ways:
        by_round = zip(*(taken[label, name] for label in groups))
        sums["layer", name] = [tuple(map(sum, zip(*each))) for each in by_round]  # type: ignore[misc]
    return taken | sums


def rows_of(taken: Timed) -> list[tuple[object, ...]]:
    """A row for each group and way: microseconds, and ratios to the base within rounds."""
    found: list[tuple[object, ...]] = []
    for (label, name), own in taken.items():
        micros = [round(statistics.median(each) * 1e6) for each in zip(*own)]
        forward, backward, both = (
            [part(a) / part(b) for a, b in zip(own, taken[label, "base"])]
            for part in (lambda each: each[0], lambda each: each[1], sum)
        )
        low, middle, high = statistics.quantiles(both) if len(both) > 1 else both * 3
        alone = [f"{statistics.median(each):.3f}" for each in (forward, backward)]
        found.append((label, name, *micros, *alone, f"{middle:.3f} ({low:.3f} to {high:.3f})"))
    return found


COLUMNS = ("linears", "way", "forward µs", "backward µs", "to base", "to base", "both to base")


@torch.no_grad()
def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[512, 4096, 16384] if device == "cuda" else [256, 1024]
    )
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=[name for name in WAYS if name != "tuned"])
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    ways = list(dict.fromkeys(["base", *options.ways]))
    found = {}
    for tokens in options.tokens:
        found[tokens] = rows_of(with_layer(measured(tokens, ways, options.rounds, device), ways))
        print(table(f"{tokens} tokens, {device}", COLUMNS, found[tokens]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
