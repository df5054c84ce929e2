"""The loss head: time and peak memory of a training step with and without `fuse_loss`, and of the operator alone.

OMP_NUM_THREADS=2 python tests/bench/loss_head.py [--json out.json] [--rounds 7]

The step is that of a Llama of 8 layers, h = 512, vocabulary 32k, 4 x 256 tokens, r = 16 on all seven linears, forward
and backward, against PEFT; contestants take turns, and the ratios are of neighbouring runs. Peaks are what torch's
allocator gave out above what was there before the step. The operator runs at 8192 tokens and a vocabulary of 128k.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import lorafx
from lorafx.tables import table

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIG = {"r": 16, "lora_alpha": 32, "target_modules": TARGETS}
VOCABULARY, TOKENS = 32_000, (4, 256)
Step = Callable[[], Any]


def base(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1376, "vocab_size": VOCABULARY, "num_hidden_layers": 8}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, use_cache=False)
    return transformers.LlamaForCausalLM(config).to(dtype).train()


def contestants(dtype: torch.dtype) -> dict[str, Step]:
    own = {"autocast_adapter_dtype": False}
    without = lorafx.passes.default.without("fuse_loss")
    models = {
        "PEFT": peft.get_peft_model(base(dtype), peft.LoraConfig(**CONFIG), **own),
        "without fuse_loss": lorafx.compile(base(dtype), CONFIG, pipeline=without, capture="graph", **own),
        "with fuse_loss": lorafx.compile(base(dtype), CONFIG, capture="graph", **own),
    }
    return {name: step_of(model) for name, model in models.items()}


def step_of(model: nn.Module) -> Step:
    ids = torch.randint(0, VOCABULARY, TOKENS, generator=torch.Generator().manual_seed(0))

    def step() -> None:
        outputs = model(input_ids=ids, labels=ids)  # with its logits, as loops hold it during backward
        outputs.loss.backward()
        for parameter in model.parameters():
            parameter.grad = None

    return step


def operators(dtype: torch.dtype, rows: int = 8192, classes: int = 128_256, width: int = 64) -> dict[str, Step]:
    torch.manual_seed(0)
    x = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    weight, labels = torch.randn(classes, width, dtype=dtype), torch.randint(0, classes, (rows,))
    fused = torch.ops.lorafx.linear_cross_entropy
    found: dict[str, Step] = {
        "lorafx": lambda: fused(x, weight, None, None, None, 0.0, labels).backward(),
        "lorafx, soft cap": lambda: fused(x, weight, None, None, None, 0.0, labels, 1, -100, 0.0, 30.0).backward(),
    }
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        found["torch"] = lambda: F.linear_cross_entropy(x, weight, labels, options=options).backward()
    return found


def peak(step: Step) -> int:
    """Bytes given out above the start."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


def seconds(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            taken[name].append(time.perf_counter() - start)
    return taken


def rows_of(title: str, steps: dict[str, Step], rounds: int) -> list[tuple[Any, ...]]:
    taken, peaks = seconds(steps, rounds), {name: peak(step) for name, step in steps.items()}
    first = next(iter(steps))
    rows = []
    for name in steps:
        ratios = sorted(own / other for own, other in zip(taken[name], taken[first]))
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        share = f"{peaks[name] / peaks[first]:.2f}"
        rows.append((title, name, statistics.median(taken[name]), f"{statistics.median(ratios):.2f}", spread))
        rows[-1] += (round(peaks[name] / 2**20), share)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        rows += rows_of(f"step, {dtype}", contestants(dtype), options.rounds)
    for dtype in (torch.float32, torch.bfloat16):
        rows += rows_of(f"operator, {dtype}", operators(dtype), 1)
    columns = ("what", "who", "s", "ratio", "from to", "peak MiB", "of the first's")
    print(table("Loss head", columns, rows))
    if options.json:
        options.json.write_text(json.dumps([dict(zip(columns, row)) for row in rows], indent=1))


if __name__ == "__main__":
    main()
