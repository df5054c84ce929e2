"""Sweep: train eight adapters, of four ranks and two learning rates, as one run on one base.

Each row of a batch has its own adapter (`adapter_names`), so that one forward and one backward pass train all of them.
Then each is trained alone, on the same batches, to see that its losses are the same. A run that exits with 0 is a test
that passed. Offline; half a minute on two CPU cores.

    python docs/examples/sweep.py
    python docs/examples/sweep.py --steps 3

The base is a small decoder with random weights, and the task to count: each sequence goes on by a step of its own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import lorafx

NUMBERS, LENGTH, ROWS = 31, 12, 4  # what is counted with, how far, and by how many sequences a batch and adapter
SWEEP = {f"r{r}_lr{number}": (r, lr) for r in (1, 2, 4, 8) for number, lr in enumerate((3e-3, 3e-2))}
TOLERANCE = 1e-6  # between losses of about 3, in float64: each step multiplies what rounding has left before it

Curves = dict[str, list[float]]


def main() -> None:
    options = parse_options()
    base = small_decoder()
    together, seconds = timed(lambda: train(base, list(SWEEP), options.steps))
    alone, seconds_alone = {}, 0.0
    for name in SWEEP:
        own, taken = timed(lambda name=name: train(base, [name], options.steps))
        alone |= own
        seconds_alone += taken
    apart = max(abs(a - b) for name in SWEEP for a, b in zip(together[name], alone[name]))
    draw(together, options.out / "sweep.png")
    table = Table("adapter", "r", "learning rate", "first loss", "last loss", title="Eight adapters, one run")
    for name, (r, lr) in SWEEP.items():
        table.add_row(name, str(r), f"{lr:g}", f"{together[name][0]:.3f}", f"{together[name][-1]:.3f}")
    Console().print(table)
    print(f"losses, together - alone: {apart:.1e} at most")
    print(f"a step of all: {seconds / seconds_alone:.2f} of eight steps one after the other")
    if apart > TOLERANCE:
        raise SystemExit(f"the curves differ by {apart:.1e}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="training steps (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/sweep"), help="output folder (default: %(default)s)")
    return parser.parse_args()


def small_decoder() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=NUMBERS, **sizes)).double()


def train(base: nn.Module, names: list[str], steps: int) -> tuple[Curves, list[float]]:
    """The losses of these adapters, trained together on a fresh view of the base, and the seconds of each step."""
    configs = {name: {"r": SWEEP[name][0], "target_modules": "all-linear"} for name in names}
    lora = lorafx.compile(base, configs[names[0]], adapter_name=names[0], random_state=0).train()
    for name in names[1:]:
        lora.add_adapter(name, configs[name], random_state=0)
    lora.set_adapter(names)
    own = {name: [p for path, p in lora.named_parameters() if f".{name}." in path] for name in names}
    optimizer = torch.optim.AdamW([{"params": own[name], "lr": SWEEP[name][1]} for name in names])
    curves: Curves = {name: [] for name in names}
    seconds: list[float] = []
    rows = [name for name in names for _ in range(ROWS)]
    for ids in batches(steps):
        start = time.perf_counter()
        chosen = {"adapter_names": rows} if len(names) > 1 else {}
        logits = lora(ids.repeat(len(names), 1), use_cache=False, **chosen).logits
        each = F.cross_entropy(logits[:, :-1].mT, ids[:, 1:].repeat(len(names), 1), reduction="none").mean(1)
        losses = lorafx.loss_by_adapter(each, rows)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, loss in losses.items():
            curves[name].append(loss.item())
        seconds.append(time.perf_counter() - start)
    return curves, seconds


def batches(steps: int) -> Iterator[Tensor]:
    """Sequences that count by steps of 1 to 3 from anywhere, (ROWS, LENGTH)."""
    rng = torch.Generator().manual_seed(1)
    for _ in range(steps):
        starts, by = (torch.randint(low, high, (ROWS, 1), generator=rng) for low, high in ((0, NUMBERS), (1, 4)))
        yield (starts + by * torch.arange(LENGTH)) % NUMBERS


def timed(run) -> tuple[Curves, float]:
    """What a run gives, and the median of its steps' seconds: the first ones make graphs."""
    curves, seconds = run()
    return curves, sorted(seconds)[len(seconds) // 2]


def draw(curves: Curves, path: Path) -> None:
    """The curves as a picture, where there is matplotlib."""
    with suppress(ImportError):
        from matplotlib.figure import Figure

        axes = Figure(figsize=(7, 4), layout="constrained").subplots()
        for name, losses in curves.items():
            axes.plot(losses, label=name.replace("_", ", "))
        axes.set(title="Counting: eight adapters of one run", xlabel="step", ylabel="cross-entropy")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        axes.figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
