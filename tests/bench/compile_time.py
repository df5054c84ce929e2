"""Seconds until the first training step of a compiled model is done, by its number of layers, from cold caches.

python tests/bench/compile_time.py [--layers 4 8] [--backend inductor] [--json out.json]

Each contestant and depth runs in a process of its own with empty caches, in turn, several rounds; what is printed are
medians, and ratios to the fewest layers of the same contestant.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
from torch import nn

import lorafx
from lorafx.tables import table

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONTESTANTS = ("peft", "peft by layer", "lorafx", "lorafx whole")


def base(layers: int) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).train()


def contestant(name: str, layers: int, backend: str) -> Callable[..., object]:
    """The model as it is called, compiled in this contestant's way but for the first call."""
    if name.startswith("lorafx"):
        whole = lorafx.passes.default.without("outline_blocks", "checkpoint_blocks")
        config = {"r": 8, "target_modules": TARGETS}
        return lorafx.compile(base(layers), config, backend=backend, pipeline=whole if "whole" in name else None)
    model = peft.get_peft_model(base(layers), peft.LoraConfig(r=8, target_modules=TARGETS))
    if name == "peft":
        return torch.compile(model, backend=backend, dynamic=True)
    for layer in model.base_model.model.model.layers:
        layer.compile(backend=backend, dynamic=True)
    return model


def first_step(name: str, layers: int, backend: str) -> float:
    ids = torch.randint(0, 512, (2, 64))
    model = contestant(name, layers, backend)
    start = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()  # type: ignore[attr-defined]
    return time.perf_counter() - start


def measured(name: str, layers: int, backend: str) -> float:
    """One cold run in a process of its own."""
    with tempfile.TemporaryDirectory() as cache:
        caches = {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        command = [sys.executable, __file__, "--one", name, str(layers), backend]
        done = subprocess.run(command, env={**os.environ, **caches}, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--contestants", nargs="+", default=CONTESTANTS, choices=CONTESTANTS)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        warnings.simplefilter("ignore")
        name, layers, backend = asked.one
        print(first_step(name, int(layers), backend))
        return
    times: dict[str, dict[int, list[float]]] = {name: {n: [] for n in asked.layers} for name in asked.contestants}
    for _ in range(asked.rounds):
        for layers in asked.layers:
            for name in asked.contestants:
                times[name][layers].append(measured(name, layers, asked.backend))
    rows = []
    for name, by_layers in times.items():
        medians = {layers: statistics.median(seconds) for layers, seconds in by_layers.items()}
        fewest = medians[min(medians)]
        rows += [
            (name, layers, median, median / fewest, f"{min(by_layers[layers]):.1f} to {max(by_layers[layers]):.1f}")
            for layers, median in medians.items()
        ]
    columns = ("contestant", "layers", "median s", "to the fewest", "from, to")
    print(
        table(f"first training step, {asked.backend}, {asked.rounds} rounds, torch {torch.__version__}", columns, rows)
    )
    if asked.json:
        asked.json.write_text(json.dumps(times, indent=2))


if __name__ == "__main__":
    main()
