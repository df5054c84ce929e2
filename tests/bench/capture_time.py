"""Seconds to capture a call and to rewrite its graph, by the number of layers, nothing lowered.

python tests/bench/capture_time.py [--call train] [--layers 4 8 32 80] [--rounds 5] [--json out.json]

The call is a step of training, or one of generation: the first, with a prompt (`prefill`), or one with a token and what
a cache holds (`decode`, and `static` for a static cache).

Depths take turns in one process, after a warm-up; what is printed are medians, the spread, and the ratios to the depth
that a limit refers to: capture to 4 layers (at most 2), rewriting to 8 (at most 1.5).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
import transformers

import lorafx
from lorafx.tables import table

LIMITS = {"capture": (4, 2.0), "rewriting": (8, 1.5)}


def measured(layers: int, call: str) -> dict[str, float]:
    """A first call of a fresh adapted model."""
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = transformers.LlamaForCausalLM(config).train(call == "train")
    lora = lorafx.compile(model, {"r": 4, "target_modules": "all-linear"}, backend="eager")
    with torch.set_grad_enabled(call == "train"):
        lora.graph(**arguments(call, config))
    (captured,) = lora.explain().calls
    (steps,) = lora.report().graphs.values()
    return {"capture": captured.capture_seconds, "rewriting": sum(step.milliseconds for step in steps) / 1e3}


def arguments(call: str, config: transformers.LlamaConfig) -> dict[str, Any]:
    """The arguments of a call: 7 tokens, or one token after 7 others."""
    ids = torch.randint(0, 128, (2, 7))
    if call == "train":
        return {"input_ids": ids, "labels": ids.clone()}
    cache: transformers.Cache = transformers.DynamicCache(config=config)
    if call == "prefill":
        return {"input_ids": ids, "past_key_values": cache, "use_cache": True}
    if call == "static":
        cache = transformers.StaticCache(config=config, max_cache_len=32)
    shape = 2, config.num_key_value_heads, 7, config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        cache.update(torch.randn(shape), torch.randn(shape), layer)
    return {"input_ids": ids[:, :1], "position_ids": torch.full((2, 1), 7), "past_key_values": cache, "use_cache": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--call", choices=["train", "prefill", "decode", "static"], default="train")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 32, 80])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    measured(2, asked.call)
    rounds = [{layers: measured(layers, asked.call) for layers in asked.layers} for _ in range(asked.rounds)]
    rows = []
    for what, (least, limit) in LIMITS.items():
        for layers in asked.layers:
            seconds = [each[layers][what] for each in rounds]
            ratios = [each[layers][what] / each[least][what] for each in rounds if least in each]
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""
            spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
            rows.append((what, layers, f"{statistics.median(seconds):.2f}", spread, f"{least}: {ratio}", limit))
    columns = ("what", "layers", "median s", "from, to", "ratio to layers", "limit")
    print(table(f"{asked.call}, {asked.rounds} rounds, torch {torch.__version__}", columns, rows))
    if asked.json:
        asked.json.write_text(json.dumps(rounds, indent=2))


if __name__ == "__main__":
    main()
